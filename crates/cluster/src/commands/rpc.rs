//! RPCs: a client's call becomes a request on the bus, answered by the part that serves the method.

use crate::client::Client;
use bus::{Bus, Headers};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;
use wire::channels;
use wire::realtime::{Error, ErrorCode, Reply, RpcRequest, RpcResult};

/// Shorter than the 5 s that clients wait for a reply, so that they get an error instead of timing out.
const RPC_TIMEOUT: Duration = Duration::from_millis(4500);

/// Calls the method over the bus and replies to the client.
pub fn call(bus: Bus, client: Arc<Client>, id: u32, request: RpcRequest) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let answer = answer(&bus, &client, request).await;

        // RPCs run outside the command loop, so each waits for room in the outbox itself.
        client.outbox.room().await;
        client.reply(&match answer {
            Ok(data) => Reply { id, rpc: Some(RpcResult { data }), ..Reply::default() },
            Err((code, message)) => {
                let error = Error { code, message, temporary: matches!(code, 100 | 111) };
                Reply { id, error: Some(error), ..Reply::default() }
            }
        });
    })
}

/// The data of the reply, or an error code and text, which may be those of the serving part.
async fn answer(bus: &Bus, client: &Client, request: RpcRequest) -> Result<Bytes, (u32, String)> {
    let method = request.method;
    let Some(subject) = wire::subjects::rpc(&method) else {
        return Err((ErrorCode::MethodNotFound as u32, "no such method".into()));
    };
    let headers = Headers::new()
        .with(channels::RPC_USER, &client.user)
        .with(channels::RPC_CLIENT, &client.id)
        .with(channels::RPC_ENCODING, client.encoding.as_str());

    let reply = bus
        .request(&subject, headers, request.data, RPC_TIMEOUT)
        .await
        .map_err(|error| match error {
            bus::Error::NoResponders(_) => {
                (ErrorCode::MethodNotFound as u32, format!("no running part serves the method {method:?}"))
            }
            bus::Error::Timeout(_) => (ErrorCode::Internal as u32, format!("no reply from {method:?} in time")),
            other => (ErrorCode::Internal as u32, other.to_string()),
        })?;

    match reply.headers.get(channels::RPC_ERROR_CODE) {
        None => Ok(reply.payload),
        Some(code) => {
            let text = String::from_utf8_lossy(&reply.payload).into_owned();
            Err((code.parse().unwrap_or(ErrorCode::Internal as u32), text))
        }
    }
}
