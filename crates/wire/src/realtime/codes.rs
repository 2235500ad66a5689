//! Codes of errors, unsubscribes and disconnects. The ranges are part of the contract, since clients act on them.

/// The code of an error reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    Internal = 100,
    Unauthorized = 101,
    UnknownChannel = 102,
    PermissionDenied = 103,
    MethodNotFound = 104,
    AlreadySubscribed = 105,
    LimitExceeded = 106,
    BadRequest = 107,
    NotAvailable = 108,
    TokenExpired = 109,
    Expired = 110,
    TooManyRequests = 111,
    UnrecoverablePosition = 112,
    ConcurrentPagination = 113,
}

impl ErrorCode {
    /// Whether the client may retry the command.
    pub fn is_temporary(self) -> bool {
        matches!(self, Self::Internal | Self::TooManyRequests | Self::ConcurrentPagination)
    }
}

/// Why the server closed a connection. A client does not reconnect after a code from 3500 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Disconnect {
    ConnectionClosed = 3000,
    Shutdown = 3001,
    ServerError = 3004,
    Expired = 3005,
    SubscriptionExpired = 3006,
    Slow = 3008,
    WriteError = 3009,
    InsufficientState = 3010,
    ForceReconnect = 3011,
    NoPong = 3012,
    TooManyRequests = 3013,
    InvalidToken = 3500,
    BadRequest = 3501,
    Stale = 3502,
    ForceDisconnect = 3503,
    ConnectionLimit = 3504,
    ChannelLimit = 3505,
    PermissionDenied = 3507,
    NotAvailable = 3508,
    TooManyErrors = 3509,
}

impl Disconnect {
    pub fn reason(self) -> &'static str {
        match self {
            Self::ConnectionClosed => "connection closed",
            Self::Shutdown => "shutdown",
            Self::ServerError => "internal server error",
            Self::Expired => "connection expired",
            Self::SubscriptionExpired => "subscription expired",
            Self::Slow => "slow",
            Self::WriteError => "write error",
            Self::InsufficientState => "insufficient state",
            Self::ForceReconnect => "force reconnect",
            Self::NoPong => "no pong",
            Self::TooManyRequests => "too many requests",
            Self::InvalidToken => "invalid token",
            Self::BadRequest => "bad request",
            Self::Stale => "stale",
            Self::ForceDisconnect => "force disconnect",
            Self::ConnectionLimit => "connection limit",
            Self::ChannelLimit => "channel limit",
            Self::PermissionDenied => "permission denied",
            Self::NotAvailable => "not available",
            Self::TooManyErrors => "too many errors",
        }
    }
}

/// Why the server ended a subscription. A client subscribes again after a code from 2500 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Unsubscribe {
    Server = 2000,
    InsufficientState = 2500,
    Expired = 2501,
}

impl Unsubscribe {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Server => "server unsubscribe",
            Self::InsufficientState => "insufficient state",
            Self::Expired => "subscription expired",
        }
    }
}
