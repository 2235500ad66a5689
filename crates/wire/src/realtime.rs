//! The Centrifuge client protocol v2 in JSON and protobuf: messages, framing and codes.
//!
//! Field numbers follow the public `client.proto`. `bytes` fields hold the application's data; in JSON messages that
//! data is embedded JSON, passed through byte for byte.

mod codes;
mod framing;
mod method;
mod raw;

pub use codes::{Disconnect, ErrorCode, Unsubscribe};
pub use framing::{Encoding, FrameError, Framed, decode_commands, decode_replies, encode_command, encode_reply};
pub use method::Method;

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Defines messages in both encodings. Each field has its protobuf type and number; JSON omits empty fields.
macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$attr:meta])* $field:ident: $type:ty [$($prost:tt)*],)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name {
            $(
                #[prost($($prost)*)]
                #[serde(skip_serializing_if = "is_default")]
                $(#[$attr])*
                pub $field: $type,
            )*
        }
    )*};
}

messages! {
    /// A message from a client, whose first set field is its [`Method`]. A command without any field is a pong.
    Command {
        id: u32 [uint32, tag = "1"],
        connect: Option<ConnectRequest> [message, optional, tag = "4"],
        subscribe: Option<SubscribeRequest> [message, optional, tag = "5"],
        unsubscribe: Option<UnsubscribeRequest> [message, optional, tag = "6"],
        publish: Option<PublishRequest> [message, optional, tag = "7"],
        presence: Option<PresenceRequest> [message, optional, tag = "8"],
        presence_stats: Option<PresenceStatsRequest> [message, optional, tag = "9"],
        history: Option<HistoryRequest> [message, optional, tag = "10"],
        ping: Option<PingRequest> [message, optional, tag = "11"],
        send: Option<SendRequest> [message, optional, tag = "12"],
        rpc: Option<RpcRequest> [message, optional, tag = "13"],
        refresh: Option<RefreshRequest> [message, optional, tag = "14"],
        sub_refresh: Option<SubRefreshRequest> [message, optional, tag = "15"],
    }
    /// A message from the server: the reply to the command with its id, or a push if the id is 0. A reply without any
    /// field is a ping.
    Reply {
        id: u32 [uint32, tag = "1"],
        error: Option<Error> [message, optional, tag = "2"],
        push: Option<Push> [message, optional, tag = "4"],
        connect: Option<ConnectResult> [message, optional, tag = "5"],
        subscribe: Option<SubscribeResult> [message, optional, tag = "6"],
        unsubscribe: Option<UnsubscribeResult> [message, optional, tag = "7"],
        publish: Option<PublishResult> [message, optional, tag = "8"],
        presence: Option<PresenceResult> [message, optional, tag = "9"],
        presence_stats: Option<PresenceStatsResult> [message, optional, tag = "10"],
        history: Option<HistoryResult> [message, optional, tag = "11"],
        ping: Option<PingResult> [message, optional, tag = "12"],
        rpc: Option<RpcResult> [message, optional, tag = "13"],
        refresh: Option<RefreshResult> [message, optional, tag = "14"],
        sub_refresh: Option<SubRefreshResult> [message, optional, tag = "15"],
    }
    Push {
        id: i64 [int64, tag = "1"],
        channel: String [string, tag = "2"],
        r#pub: Option<Publication> [message, optional, tag = "4"],
        join: Option<Join> [message, optional, tag = "5"],
        leave: Option<Leave> [message, optional, tag = "6"],
        unsubscribe: Option<UnsubscribePush> [message, optional, tag = "7"],
        message: Option<MessagePush> [message, optional, tag = "8"],
        subscribe: Option<SubscribePush> [message, optional, tag = "9"],
        connect: Option<ConnectPush> [message, optional, tag = "10"],
        disconnect: Option<DisconnectPush> [message, optional, tag = "11"],
        refresh: Option<RefreshPush> [message, optional, tag = "12"],
    }
    Error {
        code: u32 [uint32, tag = "1"],
        message: String [string, tag = "2"],
        temporary: bool [bool, tag = "3"],
    }
    ClientInfo {
        user: String [string, tag = "1"],
        client: String [string, tag = "2"],
        #[serde(with = "raw")]
        conn_info: Bytes [bytes = "bytes", tag = "3"],
        #[serde(with = "raw")]
        chan_info: Bytes [bytes = "bytes", tag = "4"],
    }
    Publication {
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "4"],
        info: Option<ClientInfo> [message, optional, tag = "5"],
        offset: u64 [uint64, tag = "6"],
        tags: BTreeMap<String, String> [btree_map = "string, string", tag = "7"],
        delta: bool [bool, tag = "8"],
        time: i64 [int64, tag = "9"],
        channel: String [string, tag = "10"],
    }
    Join { info: Option<ClientInfo> [message, optional, tag = "1"], }
    Leave { info: Option<ClientInfo> [message, optional, tag = "1"], }
    UnsubscribePush {
        code: u32 [uint32, tag = "2"],
        reason: String [string, tag = "3"],
    }
    SubscribePush {
        recoverable: bool [bool, tag = "1"],
        epoch: String [string, tag = "4"],
        offset: u64 [uint64, tag = "5"],
        positioned: bool [bool, tag = "6"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "7"],
    }
    MessagePush {
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "1"],
    }
    DisconnectPush {
        code: u32 [uint32, tag = "1"],
        reason: String [string, tag = "2"],
        reconnect: bool [bool, tag = "3"],
    }
    RefreshPush {
        expires: bool [bool, tag = "1"],
        ttl: u32 [uint32, tag = "2"],
    }
    ConnectPush {
        client: String [string, tag = "1"],
        version: String [string, tag = "2"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "3"],
        subs: BTreeMap<String, SubscribeResult> [btree_map = "string, message", tag = "4"],
        expires: bool [bool, tag = "5"],
        ttl: u32 [uint32, tag = "6"],
        ping: u32 [uint32, tag = "7"],
        pong: bool [bool, tag = "8"],
        session: String [string, tag = "9"],
        node: String [string, tag = "10"],
        time: i64 [int64, tag = "11"],
    }
    ConnectRequest {
        token: String [string, tag = "1"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "2"],
        subs: BTreeMap<String, SubscribeRequest> [btree_map = "string, message", tag = "3"],
        name: String [string, tag = "4"],
        version: String [string, tag = "5"],
        headers: BTreeMap<String, String> [btree_map = "string, string", tag = "6"],
    }
    ConnectResult {
        client: String [string, tag = "1"],
        version: String [string, tag = "2"],
        expires: bool [bool, tag = "3"],
        ttl: u32 [uint32, tag = "4"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "5"],
        subs: BTreeMap<String, SubscribeResult> [btree_map = "string, message", tag = "6"],
        ping: u32 [uint32, tag = "7"],
        pong: bool [bool, tag = "8"],
        session: String [string, tag = "9"],
        node: String [string, tag = "10"],
        time: i64 [int64, tag = "11"],
    }
    SubscribeRequest {
        channel: String [string, tag = "1"],
        token: String [string, tag = "2"],
        recover: bool [bool, tag = "3"],
        epoch: String [string, tag = "6"],
        offset: u64 [uint64, tag = "7"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "8"],
        positioned: bool [bool, tag = "9"],
        recoverable: bool [bool, tag = "10"],
        join_leave: bool [bool, tag = "11"],
        delta: String [string, tag = "12"],
    }
    SubscribeResult {
        expires: bool [bool, tag = "1"],
        ttl: u32 [uint32, tag = "2"],
        recoverable: bool [bool, tag = "3"],
        epoch: String [string, tag = "6"],
        publications: Vec<Publication> [message, repeated, tag = "7"],
        recovered: bool [bool, tag = "8"],
        offset: u64 [uint64, tag = "9"],
        positioned: bool [bool, tag = "10"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "11"],
        was_recovering: bool [bool, tag = "12"],
        delta: bool [bool, tag = "13"],
        id: i64 [int64, tag = "14"],
    }
    UnsubscribeRequest { channel: String [string, tag = "1"], }
    UnsubscribeResult {}
    PublishRequest {
        channel: String [string, tag = "1"],
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "2"],
    }
    PublishResult {}
    PresenceRequest { channel: String [string, tag = "1"], }
    PresenceResult { presence: BTreeMap<String, ClientInfo> [btree_map = "string, message", tag = "1"], }
    PresenceStatsRequest { channel: String [string, tag = "1"], }
    PresenceStatsResult {
        num_clients: u32 [uint32, tag = "1"],
        num_users: u32 [uint32, tag = "2"],
    }
    StreamPosition {
        offset: u64 [uint64, tag = "1"],
        epoch: String [string, tag = "2"],
    }
    HistoryRequest {
        channel: String [string, tag = "1"],
        limit: i32 [int32, tag = "7"],
        since: Option<StreamPosition> [message, optional, tag = "8"],
        reverse: bool [bool, tag = "9"],
    }
    HistoryResult {
        publications: Vec<Publication> [message, repeated, tag = "1"],
        epoch: String [string, tag = "2"],
        offset: u64 [uint64, tag = "3"],
    }
    PingRequest {}
    PingResult {}
    SendRequest {
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "1"],
    }
    RpcRequest {
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "1"],
        method: String [string, tag = "2"],
    }
    RpcResult {
        #[serde(with = "raw")]
        data: Bytes [bytes = "bytes", tag = "1"],
    }
    RefreshRequest { token: String [string, tag = "1"], }
    RefreshResult {
        client: String [string, tag = "1"],
        version: String [string, tag = "2"],
        expires: bool [bool, tag = "3"],
        ttl: u32 [uint32, tag = "4"],
    }
    SubRefreshRequest {
        channel: String [string, tag = "1"],
        token: String [string, tag = "2"],
    }
    SubRefreshResult {
        expires: bool [bool, tag = "1"],
        ttl: u32 [uint32, tag = "2"],
    }
}

impl Reply {
    pub fn failed(id: u32, code: ErrorCode, message: impl Into<String>) -> Self {
        let error = Error {
            code: code as u32,
            message: message.into(),
            temporary: code.is_temporary(),
        };
        Self { id, error: Some(error), ..Self::default() }
    }

    pub fn push(channel: &str, push: Push) -> Self {
        Self { push: Some(Push { channel: channel.into(), ..push }), ..Self::default() }
    }
}
