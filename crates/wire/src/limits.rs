//! Every limit of the wire in one place, with how they relate.

/// An IPC frame, header included, either direction.
pub const IPC_FRAME_MAX: usize = 4 * 1024 * 1024;
/// A decide request on the bus.
pub const DECIDE_MAX: usize = 1024 * 1024;
/// Ids (request, trace, tenant, run) in bytes.
pub const ID_MAX: usize = 128;
/// An idempotency key in bytes.
pub const IDEMPOTENCY_KEY_MAX: usize = 256;
/// A channel name in bytes.
pub const CHANNEL_MAX: usize = 255;
/// One WebSocket message from a client.
pub const CLIENT_MESSAGE_MAX: usize = 64 * 1024;
/// One publication's data, whoever publishes.
pub const PUBLICATION_MAX: usize = 1024 * 1024;
/// Publications that one history request returns at most.
pub const HISTORY_PAGE_MAX: usize = 300;
/// Channels one connection may hold.
pub const CHANNELS_PER_CLIENT_MAX: usize = 128;
/// One message on the bus.
pub const BUS_MESSAGE_MAX: usize = 8 * 1024 * 1024;

const _: () = assert!(DECIDE_MAX < IPC_FRAME_MAX);
const _: () = assert!(IPC_FRAME_MAX < BUS_MESSAGE_MAX);
const _: () = assert!(CLIENT_MESSAGE_MAX <= PUBLICATION_MAX);
const _: () = assert!(PUBLICATION_MAX < BUS_MESSAGE_MAX);
