//! A command as one value, so that a server handles it in one `match`.

use super::{
    Command, ConnectRequest, HistoryRequest, PingRequest, PresenceRequest, PresenceStatsRequest, PublishRequest,
    RefreshRequest, RpcRequest, SendRequest, SubRefreshRequest, SubscribeRequest, UnsubscribeRequest,
};

/// What a command asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    Connect(ConnectRequest),
    Subscribe(SubscribeRequest),
    Unsubscribe(UnsubscribeRequest),
    Publish(PublishRequest),
    Presence(PresenceRequest),
    PresenceStats(PresenceStatsRequest),
    History(HistoryRequest),
    Ping(PingRequest),
    Send(SendRequest),
    Rpc(RpcRequest),
    Refresh(RefreshRequest),
    SubRefresh(SubRefreshRequest),
}

impl Command {
    /// Whether this is the answer to a ping: neither an id nor a method.
    pub fn is_pong(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the first field that is set, in the order of field numbers; `None` if the command has no known method.
    pub fn into_method(self) -> Option<Method> {
        let Self {
            id: _,
            connect,
            subscribe,
            unsubscribe,
            publish,
            presence,
            presence_stats,
            history,
            ping,
            send,
            rpc,
            refresh,
            sub_refresh,
        } = self;
        connect
            .map(Method::Connect)
            .or_else(|| subscribe.map(Method::Subscribe))
            .or_else(|| unsubscribe.map(Method::Unsubscribe))
            .or_else(|| publish.map(Method::Publish))
            .or_else(|| presence.map(Method::Presence))
            .or_else(|| presence_stats.map(Method::PresenceStats))
            .or_else(|| history.map(Method::History))
            .or_else(|| ping.map(Method::Ping))
            .or_else(|| send.map(Method::Send))
            .or_else(|| rpc.map(Method::Rpc))
            .or_else(|| refresh.map(Method::Refresh))
            .or_else(|| sub_refresh.map(Method::SubRefresh))
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;

    fn method(json: &str) -> Option<Method> {
        decode_commands(Encoding::Json, &Bytes::from(json.to_string()))
            .unwrap()
            .remove(0)
            .into_method()
    }

    #[test]
    fn first_set_field_is_the_method() {
        // In the order of field numbers. The order of the keys in JSON makes no difference.
        let names = [
            "connect",
            "subscribe",
            "unsubscribe",
            "publish",
            "presence",
            "presence_stats",
            "history",
            "ping",
            "send",
            "rpc",
            "refresh",
            "sub_refresh",
        ];
        for (first, name) in names.iter().enumerate() {
            let alone = method(&format!(r#"{{"id":1,"{name}":{{}}}}"#)).unwrap();
            let fields: Vec<String> = names[first..]
                .iter()
                .rev()
                .map(|name| format!(r#""{name}":{{}}"#))
                .collect();
            assert_eq!(method(&format!("{{{}}}", fields.join(","))), Some(alone), "{name}");
        }
    }

    #[test]
    fn command_without_a_known_field_has_no_method() {
        for (json, is_pong) in [("{}", true), (r#"{"unknown":{}}"#, true), (r#"{"id":1}"#, false)] {
            let command = decode_commands(Encoding::Json, &Bytes::from(json)).unwrap().remove(0);
            assert_eq!(command.is_pong(), is_pong, "{json}");
            assert_eq!(command.into_method(), None, "{json}");
        }
    }
}
