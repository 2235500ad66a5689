//! The engine of any number of nodes that share a Redis. Each channel has a stream and a position in Redis; one script
//! updates both and publishes, atomically.
//!
//! A node that was disconnected from Redis cannot know which publications it missed, so its positioned clients
//! resubscribe and recover from the stream.

mod follow;
mod server;

use super::{Engine, Failed, Page, fresh_epoch};
use crate::hub::Hub;
use crate::{Error, Rules};
use async_trait::async_trait;
use bus::clock::unix_ms;
use bytes::Bytes;
use follow::{Follower, Follows, topic};
use futures_util::TryStreamExt;
use parking_lot::Mutex;
use prost::Message;
use redis::{RedisError, Script};
use server::{Commands, Server};
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::channels::Position;
use wire::realtime::{ClientInfo, Publication, Push};

const PREFIX: &str = "beamline:";
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(4);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A channel's position outlives its publications, so that a client that reconnects late learns that it missed some.
const POSITION_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// A presence entry that its node does not renew expires.
const PRESENCE_TTL_MS: u64 = 60_000;
/// A presence entry that expired this long ago is removed by the node that reads it. Clocks must differ by less.
const PRESENCE_REMOVED_AFTER_MS: u64 = 600_000;
/// Presence entries renewed concurrently.
const RENEWALS_MAX: usize = 64;
/// Locks that keep the publications of a channel in order. Channels with the same hash share one.
const LANES: usize = 256;

/// Reads the replication id of the server that runs the script. Redis generates a new one whenever acknowledged writes
/// may have been lost: each time a primary starts and each time a replica is promoted. The run id would not suffice: a
/// primary that became a replica, discarded its last writes and was promoted again is still the same process. The
/// script reads the id rather than the node, because the node's connection reconnects on its own and may resend to
/// another server. INFO costs about 6 µs per script.
macro_rules! replication_id {
    () => {
        r"
local life = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
if not life then return redis.error_reply('ERR INFO replication names no master_replid') end
"
    };
}

/// Reads the channel's epoch, or begins a new one if the position was written under another replication id. The history
/// stays and offsets continue: new subscribers see the history, and only recovery from the old epoch fails.
/// KEYS: stream, position · ARGV: fresh epoch, position ttl ms.
macro_rules! epoch {
    () => {
        concat!(
            replication_id!(),
            r"
local known = redis.call('HMGET', KEYS[2], 'e', 'life')
local epoch = known[1]
if not epoch then redis.call('DEL', KEYS[1]) end
if not epoch or known[2] ~= life then
  epoch = ARGV[1]
  redis.call('HSET', KEYS[2], 'e', epoch, 'life', life)
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
"
        )
    };
}

/// Run at the start, so that a server or user without INFO fails then rather than at the first publication.
const REPLICATION_ID: &str = concat!(replication_id!(), "return life");

/// Assigns the offset, stores the publication and publishes it.
/// KEYS: stream, position, idempotency · ARGV: fresh epoch, position ttl ms, publication, size, ttl ms, topic, key
/// given?, publish command. A repeated key returns the position of its first publication, even in a later epoch.
const PUBLISH: &str = concat!(
    epoch!(),
    r"
if ARGV[7] == '1' then
  local given = redis.call('GET', KEYS[3])
  if given then
    local offset, in_epoch = string.match(given, '^(%d+):(.+)$')
    return {tonumber(offset or given), in_epoch or epoch}
  end
end
local offset = redis.call('HINCRBY', KEYS[2], 's', 1)
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[4], offset .. '-0', 'd', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
if ARGV[7] == '1' then redis.call('SET', KEYS[3], offset .. ':' .. epoch, 'PX', ARGV[5]) end
redis.call(ARGV[8], ARGV[6], 'p' .. offset .. ':' .. epoch .. ':' .. ARGV[3])
return {offset, epoch}
"
);

/// Returns the epoch, the newest offset and the publications after an offset.
/// KEYS: stream, position · ARGV: fresh epoch, position ttl ms, offset after which to read.
const HISTORY: &str = concat!(
    epoch!(),
    r"
local newest = tonumber(redis.call('HGET', KEYS[2], 's') or '0')
return {epoch, newest, redis.call('XRANGE', KEYS[1], '(' .. ARGV[3] .. '-0', '+')}
"
);

pub struct Redis {
    publish_command: &'static str,
    /// One lock per lane: this node's publications to a channel are sent one at a time, because the connection may
    /// reorder them.
    order: Vec<tokio::sync::Mutex<()>>,
    hasher: RandomState,
    connection: Commands,
    history: Script,
    follows: Follows,
    /// `None` once the loop runs.
    follower: Mutex<Option<Follower>>,
    /// The presence entries of this node's clients, by channel and client. The node renews them.
    present: Mutex<HashMap<(String, String), ClientInfo>>,
}

impl Redis {
    pub async fn connect(url: &str, hub: Arc<Hub>) -> Result<Arc<Self>, Error> {
        // Errors reach the log and the operator, so they must not show the password.
        let failed = |e: RedisError| Error::Redis { url: without_password(url), problem: e.to_string() };
        let server = Server::new(url).map_err(failed)?;
        let mut connection = server.commands().await.map_err(failed)?;

        redis::cmd("EVAL")
            .arg(REPLICATION_ID)
            .arg(0)
            .query_async::<String>(&mut connection)
            .await
            .map_err(|error| Error::Redis {
                url: without_password(url),
                problem: format!("a script cannot read the replication id with INFO replication: {error}"),
            })?;

        let publish_command = server.publish_command();
        let (follows, follower) = Follower::connect(server, connection.clone(), hub)
            .await
            .map_err(failed)?;
        Ok(Arc::new(Self {
            publish_command,
            order: (0..LANES).map(|_| tokio::sync::Mutex::default()).collect(),
            hasher: RandomState::new(),
            connection,
            history: Script::new(HISTORY),
            follows,
            follower: Mutex::new(Some(follower)),
            present: Mutex::default(),
        }))
    }
}

impl Redis {
    /// Renews a presence entry, unless its client has left.
    async fn renew(&self, entry: &(String, String)) -> Result<(), RedisError> {
        let Some(info) = self.present.lock().get(entry).cloned() else {
            return Ok(());
        };

        let (channel, client) = entry;
        self.write_presence(channel, client, &info).await?;
        // If the client left meanwhile, the entry was written again after its removal.
        if !self.present.lock().contains_key(entry) {
            self.remove_presence(channel, &[client]).await?;
        }
        Ok(())
    }

    async fn write_presence(&self, channel: &str, client: &str, info: &ClientInfo) -> Result<(), RedisError> {
        let key = key(channel, "presence");

        let mut write = redis::pipe();
        write
            .hset(&key, client, presence_value(info))
            .ignore()
            .pexpire(&key, PRESENCE_TTL_MS as i64)
            .ignore();
        write.query_async(&mut self.connection.clone()).await
    }

    async fn remove_presence(
        &self,
        channel: &str,
        clients: &[impl redis::ToRedisArgs + Sync],
    ) -> Result<(), RedisError> {
        redis::cmd("HDEL")
            .arg(key(channel, "presence"))
            .arg(clients)
            .query_async(&mut self.connection.clone())
            .await
    }
}

fn without_password(urls: &str) -> String {
    let shown = urls.split(',').map(|url| match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}://…{}", &url[..scheme], &url[at..]),
        _ => url.into(),
    });
    shown.collect::<Vec<String>>().join(",")
}

fn key(channel: &str, of: &str) -> String {
    // In a cluster, the braces (a hash tag) keep a channel's keys on one server. The dot keeps the tag from being empty
    // for a channel that begins with `}`, which Redis would ignore.
    format!("{PREFIX}{of}:{{.{channel}}}")
}

#[async_trait]
impl Engine for Redis {
    async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Failed> {
        let published = async move {
            let mut connection = self.connection.clone();
            let data = publication.encode_to_vec();

            let lane = &self.order[self.hasher.hash_one(channel) as usize % LANES];
            let _turn = lane.lock().await;

            if !rules.keeps_history() {
                // Offset 0 and no epoch: see `follow::deliver`.
                let payload = [b"p0::", &data[..]].concat();
                let _: i64 = redis::cmd(self.publish_command)
                    .arg(topic(channel))
                    .arg(payload)
                    .query_async(&mut connection)
                    .await?;
                return Ok(Position::default());
            }

            let once = idempotency_key.as_deref().unwrap_or("");
            // EVAL rather than EVALSHA: if the script is not loaded, the retry would come after later publications.
            let (offset, epoch): (u64, String) = redis::cmd("EVAL")
                .arg(PUBLISH)
                .arg(3)
                .arg(key(channel, "stream"))
                .arg(key(channel, "position"))
                .arg(key(channel, &format!("once:{once}")))
                .arg(fresh_epoch())
                .arg(POSITION_TTL.as_millis() as u64)
                .arg(data)
                .arg(rules.history_size)
                .arg(rules.history_ttl.as_millis() as u64)
                .arg(topic(channel))
                .arg(if idempotency_key.is_some() { "1" } else { "0" })
                .arg(self.publish_command)
                .query_async(&mut connection)
                .await?;
            Ok::<_, Failed>(Position { offset, epoch })
        };
        // The timeout includes the wait for the lane: while Redis hangs, queued publications would otherwise wait for
        // minutes.
        let late = |_| Failed::Redis(server::io("no reply in time"));
        tokio::time::timeout(RESPONSE_TIMEOUT, published).await.map_err(late)?
    }

    async fn event(&self, channel: &str, push: Push) {
        let mut connection = self.connection.clone();
        let mut payload = vec![b'e'];
        payload.extend(push.encode_to_vec());

        let sent: Result<i64, _> = redis::cmd(self.publish_command)
            .arg(topic(channel))
            .arg(payload)
            .query_async(&mut connection)
            .await;
        if let Err(error) = sent {
            tracing::debug!(channel, %error, "cannot publish a join or leave");
        }
    }

    async fn history(&self, channel: &str, _rules: &Rules, since: Option<&Position>) -> Result<Page, Failed> {
        type Entries = Vec<(String, Vec<(String, Vec<u8>)>)>;
        let mut connection = self.connection.clone();
        let (epoch, offset, entries): (String, u64, Entries) = self
            .history
            .key(key(channel, "stream"))
            .key(key(channel, "position"))
            .arg(fresh_epoch())
            .arg(POSITION_TTL.as_millis() as u64)
            .arg(since.map_or(0, |since| since.offset))
            .invoke_async(&mut connection)
            .await?;

        // The id of a stream entry is `<offset>-0`.
        let publications = entries.into_iter().filter_map(|(id, fields)| {
            let offset = id.split('-').next()?.parse().ok()?;
            let publication = Publication::decode(Bytes::from(fields.into_iter().next()?.1)).ok()?;
            Some(Publication { offset, ..publication })
        });
        Ok(Page {
            publications: publications.collect(),
            position: Position { offset, epoch },
        })
    }

    async fn present(&self, channel: &str, client: &str, info: Option<ClientInfo>) -> Result<(), Failed> {
        let entry = (channel.to_string(), client.to_string());
        match info {
            Some(info) => {
                self.present.lock().insert(entry, info.clone());
                self.write_presence(channel, client, &info).await?;
            }
            None => {
                // Removed here first, so that an entry that cannot be removed from Redis is not renewed and expires.
                self.present.lock().remove(&entry);
                self.remove_presence(channel, &[client]).await?;
            }
        }
        Ok(())
    }

    async fn presence(&self, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Failed> {
        let mut connection = self.connection.clone();
        let entries: HashMap<String, Vec<u8>> = redis::cmd("HGETALL")
            .arg(key(channel, "presence"))
            .query_async(&mut connection)
            .await?;

        let now = unix_ms();
        let (mut alive, mut expired) = (BTreeMap::new(), Vec::new());
        for (client, value) in entries {
            let Some((until, info)) = value.split_first_chunk::<8>() else {
                continue;
            };
            let until = u64::from_be_bytes(*until);
            if until > now {
                alive.extend(ClientInfo::decode(info).ok().map(|info| (client, info)));
            } else if until.saturating_add(PRESENCE_REMOVED_AFTER_MS) < now {
                expired.push(client);
            }
        }

        // Entries of crashed nodes. The key itself does not expire while other clients renew it.
        if !expired.is_empty() {
            self.remove_presence(channel, &expired).await?;
        }
        Ok(alive)
    }

    async fn follow(&self, channel: &str) -> Result<(), Failed> {
        Ok(self.follows.set(channel, true).await?)
    }

    async fn unfollow(&self, channel: &str) {
        if let Err(error) = self.follows.set(channel, false).await {
            tracing::debug!(channel, %error, "cannot unsubscribe from a topic");
        }
    }

    async fn serve(&self, cancel: CancellationToken) {
        let follower = self.follower.lock().take();
        if let Some(follower) = follower {
            follower.run(cancel).await;
        }
    }

    async fn tidy(&self) {
        let own: Vec<_> = self.present.lock().keys().cloned().collect();
        let renewals = futures_util::stream::iter(own.iter().map(Ok));
        let renewed = renewals
            .try_for_each_concurrent(RENEWALS_MAX, |entry| self.renew(entry))
            .await;
        if let Err(error) = renewed {
            tracing::warn!(%error, "cannot renew presence entries; those of this node expire within a minute");
        }
    }

    fn describe(&self) -> &'static str {
        "redis"
    }
}

/// A presence entry: when it expires, in Unix milliseconds as 8 bytes, then the client's info.
fn presence_value(info: &ClientInfo) -> Vec<u8> {
    let mut value = (unix_ms() + PRESENCE_TTL_MS).to_be_bytes().to_vec();
    value.extend(info.encode_to_vec());
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn presence_is_renewed_for_present_clients_only() {
        let server = testkit::RedisServer::start().await;
        let redis = Redis::connect(&server.url(), Arc::default()).await.unwrap();
        let ann = ClientInfo { user: "ann".into(), ..ClientInfo::default() };
        let [here, left] = ["here", "left"].map(|client| ("c".to_string(), client.to_string()));
        for (channel, client) in [&here, &left] {
            redis.present(channel, client, Some(ann.clone())).await.unwrap();
        }
        redis.present("c", "left", None).await.unwrap();

        for entry in [&here, &left] {
            redis.renew(entry).await.unwrap();
        }
        let present = redis.presence("c").await.unwrap();
        assert_eq!(present.keys().collect::<Vec<_>>(), ["here"]);
        assert_eq!(redis.present.lock().len(), 1);

        // An entry of a node that crashed long ago, in a channel that is still used.
        let expired = [1_u64.to_be_bytes().to_vec(), ann.encode_to_vec()].concat();
        let key = key("c", "presence");
        let _: i64 = redis::cmd("HSET")
            .arg(&key)
            .arg("dead")
            .arg(expired)
            .query_async(&mut redis.connection.clone())
            .await
            .unwrap();
        assert_eq!(redis.presence("c").await.unwrap().len(), 1);
        let fields: i64 = redis::cmd("HLEN")
            .arg(&key)
            .query_async(&mut redis.connection.clone())
            .await
            .unwrap();
        assert_eq!(fields, 1, "the entry is removed");
    }
}
