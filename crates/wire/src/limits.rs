//! All limits of the wire formats, and assertions on how they relate.

/// An IPC frame in either direction, header included, in bytes.
pub const IPC_FRAME_MAX: usize = 4 * 1024 * 1024;
/// A decide request on the bus, in bytes.
pub const DECIDE_MAX: usize = 1024 * 1024;
/// An id (of a request, trace, tenant or run), in bytes.
pub const ID_MAX: usize = 128;
/// An idempotency key, in bytes.
pub const IDEMPOTENCY_KEY_MAX: usize = 256;
/// The longest cool-down that a rate-limited provider can ask for, in seconds.
pub const COOL_DOWN_MAX_S: u64 = 3600;
/// The cool-down of a rate-limited provider that names no time, in seconds.
pub const COOL_DOWN_DEFAULT_S: u64 = 5;
/// A channel name, in bytes.
pub const CHANNEL_MAX: usize = 255;
/// A WebSocket message from a client, in bytes.
pub const CLIENT_MESSAGE_MAX: usize = 64 * 1024;
/// The data of a publication, from any publisher, in bytes.
pub const PUBLICATION_MAX: usize = 1024 * 1024;
/// Publications that one history request returns.
pub const HISTORY_PAGE_MAX: usize = 300;
/// Channels that one connection may subscribe to.
pub const CHANNELS_PER_CLIENT_MAX: usize = 128;
/// A message on the bus, in bytes.
pub const BUS_MESSAGE_MAX: usize = 8 * 1024 * 1024;

const _: () = assert!(COOL_DOWN_DEFAULT_S <= COOL_DOWN_MAX_S);
const _: () = assert!(DECIDE_MAX < IPC_FRAME_MAX);
const _: () = assert!(IPC_FRAME_MAX < BUS_MESSAGE_MAX);
const _: () = assert!(CLIENT_MESSAGE_MAX <= PUBLICATION_MAX);
const _: () = assert!(PUBLICATION_MAX < BUS_MESSAGE_MAX);
