//! Any number of nodes on one Redis: a stream and a position per channel, changed and published in one atomic step.
//!
//! A node that was cut off from Redis cannot know what it missed: its positioned subscribers are told to come again, and
//! recover from the stream.

mod follow;
mod server;

use super::{Engine, Failed, Page};
use crate::hub::Hub;
use crate::{Error, Rules};
use async_trait::async_trait;
use bytes::Bytes;
use follow::{Follower, Follows, topic};
use parking_lot::Mutex;
use prost::Message;
use redis::{RedisError, Script};
use server::{Commands, Server};
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;
use wire::channels::Position;
use wire::realtime::{ClientInfo, Publication, Push};

const PREFIX: &str = "beamline:";
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(4);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A channel's position outlives its publications, so that a late client learns that it missed some.
const POSITION_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// A presence entry that its node does not renew is gone.
const PRESENCE_TTL_MS: u64 = 60_000;
/// Channels share their order with the others of their lane.
const LANES: usize = 256;

/// KEYS: stream, position, idempotency · ARGV: publication, size, ttl ms, topic, fresh epoch, key given?, position ttl ms,
/// publish command.
const PUBLISH: &str = r"
local epoch = redis.call('HGET', KEYS[2], 'e')
if not epoch then
  epoch = ARGV[5]
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[2], 'e', epoch)
end
if ARGV[6] == '1' then
  local known = redis.call('GET', KEYS[3])
  if known then return {tonumber(known), epoch} end
end
local offset = redis.call('HINCRBY', KEYS[2], 's', 1)
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], offset .. '-0', 'd', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[7])
if ARGV[6] == '1' then redis.call('SET', KEYS[3], offset, 'PX', ARGV[3]) end
redis.call(ARGV[8], ARGV[4], 'p' .. offset .. ':' .. epoch .. ':' .. ARGV[1])
return {offset, epoch}
";

/// KEYS: stream, position · ARGV: behind this offset, fresh epoch, position ttl ms.
const HISTORY: &str = r"
if redis.call('HSETNX', KEYS[2], 'e', ARGV[2]) == 1 then redis.call('DEL', KEYS[1]) end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local meta = redis.call('HMGET', KEYS[2], 'e', 's')
return {meta[1], tonumber(meta[2] or '0'), redis.call('XRANGE', KEYS[1], '(' .. ARGV[1] .. '-0', '+')}
";

pub struct Redis {
    publish_command: &'static str,
    /// Publications of this node to a channel go one after the other: within the connection they may overtake.
    order: Vec<tokio::sync::Mutex<()>>,
    hasher: RandomState,
    connection: Commands,
    history: Script,
    follows: Follows,
    /// Until it is served.
    follower: Mutex<Option<Follower>>,
    /// Those of this node, renewed now and then.
    present: Mutex<HashMap<(String, String), ClientInfo>>,
}

impl Redis {
    pub async fn connect(url: &str, hub: Arc<Hub>) -> Result<Arc<Self>, Error> {
        let failed = |e: RedisError| Error::Redis { url: without_password(url), problem: e.to_string() };
        let server = Server::new(url).map_err(failed)?;
        let connection = server.commands().await.map_err(failed)?;
        let publish_command = server.publish_command();
        let (follows, follower) = Follower::connect(server, connection.clone(), hub).await.map_err(failed)?;
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

fn without_password(urls: &str) -> String {
    let shown = urls.split(',').map(|url| match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}://…{}", &url[..scheme], &url[at..]),
        _ => url.into(),
    });
    shown.collect::<Vec<String>>().join(",")
}

fn key(channel: &str, of: &str) -> String {
    // The braces keep a channel's keys on one server of a cluster; the dot, that they do not begin with the end.
    format!("{PREFIX}{of}:{{.{channel}}}")
}

fn fresh_epoch() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..8].to_string()
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
        let mut connection = self.connection.clone();
        let data = publication.encode_to_vec();
        let _turn = self.order[self.hasher.hash_one(channel) as usize % LANES].lock().await;
        if !rules.keeps_history() {
            let payload = [b"p0::", &data[..]].concat();
            let _: i64 =
                redis::cmd(self.publish_command).arg(topic(channel)).arg(payload).query_async(&mut connection).await?;
            return Ok(Position::default());
        }
        let once = idempotency_key.as_deref().unwrap_or("");
        // Not by its hash: where the script is not known yet, the retry would come behind later publications.
        let (offset, epoch): (u64, String) = redis::cmd("EVAL")
            .arg(PUBLISH)
            .arg(3)
            .arg(key(channel, "stream"))
            .arg(key(channel, "position"))
            .arg(key(channel, &format!("once:{once}")))
            .arg(data)
            .arg(rules.history_size)
            .arg(rules.history_ttl.as_millis() as u64)
            .arg(topic(channel))
            .arg(fresh_epoch())
            .arg(if idempotency_key.is_some() { "1" } else { "0" })
            .arg(POSITION_TTL.as_millis() as u64)
            .arg(self.publish_command)
            .query_async(&mut connection)
            .await?;
        Ok(Position { offset, epoch })
    }

    async fn event(&self, channel: &str, push: Push) {
        let mut connection = self.connection.clone();
        let mut payload = vec![b'e'];
        payload.extend(push.encode_to_vec());
        let sent: Result<i64, _> =
            redis::cmd(self.publish_command).arg(topic(channel)).arg(payload).query_async(&mut connection).await;
        if let Err(error) = sent {
            tracing::debug!(channel, %error, "a join or leave was not published");
        }
    }

    async fn history(&self, channel: &str, _rules: &Rules, since: Option<&Position>) -> Result<Page, Failed> {
        type Entries = Vec<(String, Vec<(String, Vec<u8>)>)>;
        let mut connection = self.connection.clone();
        let (epoch, offset, entries): (String, u64, Entries) = self
            .history
            .key(key(channel, "stream"))
            .key(key(channel, "position"))
            .arg(since.map_or(0, |since| since.offset))
            .arg(fresh_epoch())
            .arg(POSITION_TTL.as_millis() as u64)
            .invoke_async(&mut connection)
            .await?;
        let publications = entries.into_iter().filter_map(|(id, fields)| {
            let offset = id.split('-').next()?.parse().ok()?;
            let publication = Publication::decode(Bytes::from(fields.into_iter().next()?.1)).ok()?;
            Some(Publication { offset, ..publication })
        });
        Ok(Page { publications: publications.collect(), position: Position { offset, epoch } })
    }

    async fn present(&self, channel: &str, client: &str, info: Option<ClientInfo>) -> Result<(), Failed> {
        let mut connection = self.connection.clone();
        let key = key(channel, "presence");
        let entry = (channel.to_string(), client.to_string());
        match info {
            Some(info) => {
                let value = presence_value(&info);
                self.present.lock().insert(entry, info);
                let _: () = redis::pipe()
                    .hset(&key, client, value)
                    .ignore()
                    .pexpire(&key, PRESENCE_TTL_MS as i64)
                    .ignore()
                    .query_async(&mut connection)
                    .await?;
            }
            None => {
                self.present.lock().remove(&entry);
                let _: i64 = redis::cmd("HDEL").arg(&key).arg(client).query_async(&mut connection).await?;
            }
        }
        Ok(())
    }

    async fn presence(&self, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Failed> {
        let mut connection = self.connection.clone();
        let entries: HashMap<String, Vec<u8>> =
            redis::cmd("HGETALL").arg(key(channel, "presence")).query_async(&mut connection).await?;
        let now = now_ms();
        let alive = entries.into_iter().filter_map(|(client, value)| {
            let (until, info) = value.split_first_chunk::<8>()?;
            (u64::from_be_bytes(*until) > now).then(|| Some((client, ClientInfo::decode(info).ok()?)))?
        });
        Ok(alive.collect())
    }

    async fn follow(&self, channel: &str) -> Result<(), Failed> {
        Ok(self.follows.set(channel, true).await?)
    }

    async fn unfollow(&self, channel: &str) {
        if let Err(error) = self.follows.set(channel, false).await {
            tracing::debug!(channel, %error, "a topic was not left");
        }
    }

    async fn serve(&self, cancel: CancellationToken) {
        let follower = self.follower.lock().take();
        if let Some(follower) = follower {
            follower.run(cancel).await;
        }
    }

    async fn tidy(&self) {
        let mine: Vec<_> = self.present.lock().iter().map(|(entry, info)| (entry.clone(), info.clone())).collect();
        for ((channel, client), info) in mine {
            if let Err(error) = self.present(&channel, &client, Some(info)).await {
                tracing::debug!(channel, %error, "presence was not renewed");
                return;
            }
        }
    }

    fn describe(&self) -> &'static str {
        "redis"
    }
}

/// When it ends, milliseconds since the epoch, then who it is.
fn presence_value(info: &ClientInfo) -> Vec<u8> {
    let mut value = (now_ms() + PRESENCE_TTL_MS).to_be_bytes().to_vec();
    value.extend(info.encode_to_vec());
    value
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
