//! The rooms, few enough to keep in memory; every web app reloads when one of them makes a room.

use super::quotas::{Quotas, Refused, Spent};
use crate::channels::{Channels, LOBBY};
use crate::db::{Db, Result, now_ms};
use crate::rpc::Refusal;
use bus::{Bus, Subscription};
use parking_lot::RwLock;
use std::collections::HashSet;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::chat::{Event, Room};
use wire::realtime::ErrorCode;

/// Core, to every web app: the rooms have changed.
const CHANGED: &str = "beamline.webapp.v1.rooms";
/// A word of a change may be lost.
const RELOAD_EVERY: Duration = Duration::from_secs(10);
const NAME_MAX: usize = 48;
const ROOMS_MAX: usize = 500;

/// Deleted rooms whose links still say so.
const GONE_MAX: i64 = 1000;

pub struct Rooms {
    db: Db,
    bus: Bus,
    channels: Channels,
    quotas: Quotas,
    operators: Vec<String>,
    known: RwLock<Known>,
    /// One at a time: what was read first must not overwrite what was read later.
    reloading: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Known {
    all: Vec<Made>,
    gone: HashSet<String>,
}

struct Made {
    room: Room,
    maker: String,
}

impl Rooms {
    pub async fn load(db: Db, bus: Bus, channels: Channels, quotas: Quotas, operators: Vec<String>) -> Result<Self> {
        let (known, reloading) = (RwLock::default(), tokio::sync::Mutex::default());
        let rooms = Self { db, bus, channels, quotas, operators, known, reloading };
        rooms.reload().await?;
        Ok(rooms)
    }

    pub async fn subscribe(&self) -> bus::Result<Subscription> {
        self.bus.subscribe(CHANGED, None, 64).await
    }

    pub async fn follow(&self, mut changes: Subscription, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(RELOAD_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                change = changes.next() => if change.is_none() { return },
                _ = ticks.tick() => {}
            }
            if let Err(error) = self.reload().await {
                tracing::warn!(%error, "the rooms were not read again");
            }
        }
    }

    pub fn all(&self) -> Vec<Room> {
        self.known.read().all.iter().map(|made| made.room.clone()).collect()
    }

    pub fn get(&self, id: &str) -> Option<Room> {
        self.known
            .read()
            .all
            .iter()
            .find(|made| made.room.id == id)
            .map(|made| made.room.clone())
    }

    /// Whether there was a room of this id, which was deleted.
    pub fn is_gone(&self, id: &str) -> bool {
        self.known.read().gone.contains(id)
    }

    pub fn is_operator(&self, user: &str) -> bool {
        self.operators.iter().any(|operator| operator == user)
    }

    /// Whether a user may delete a room, and stop anybody's answers in it: its maker and operators may.
    pub fn manages(&self, user: &str, room: &str) -> bool {
        let made = |made: &Made| made.room.id == room && made.maker == user;
        self.is_operator(user) || self.known.read().all.iter().any(made)
    }

    /// The room of this name, made now if there is none.
    pub async fn create(&self, name: &str, maker: &str) -> Result<Room, Refusal> {
        let name = name.trim().trim_start_matches('#');
        let id = slug(name);
        if id.is_empty() || id == "lobby" || name.len() > NAME_MAX || name.contains(char::is_control) {
            let text = format!(
                "a room's name has 1 to {NAME_MAX} bytes, with a letter or digit and no control characters, and is not “lobby”"
            );
            return Err(Refusal::bad(text));
        }
        if let Some(known) = self.get(&id) {
            return Ok(known);
        }
        if self.known.read().all.len() >= ROOMS_MAX {
            return Err(Refusal(
                ErrorCode::LimitExceeded,
                format!("there are {ROOMS_MAX} rooms, the most there can be"),
            ));
        }

        self.insert(&id, name, maker).await.map_err(|refused| match refused {
            Refused::Over(over) => over.into(),
            other => Refusal::internal("a room cannot be written", other),
        })?;
        self.changed().await?;
        let room = self
            .get(&id)
            .ok_or_else(|| Refusal::again("the room was deleted just now; make it again"))?;
        let told = self
            .channels
            .publish_json(LOBBY, &Event::Room { room: room.clone() }, None)
            .await;
        if let Err(error) = told {
            tracing::warn!(error, "pages were not told of a new room; they see it when they are loaded again");
        }
        Ok(room)
    }

    /// Writes a new room, or one in place of a deleted one; nothing, if another was faster.
    async fn insert(&self, id: &str, name: &str, maker: &str) -> Result<(), Refused> {
        let now = now_ms();
        let mut tx = self.db.begin().await?;
        let insert =
            "INSERT INTO rooms (id, name, created_at, maker) VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO UPDATE
            SET name = excluded.name, created_at = excluded.created_at, maker = excluded.maker, deleted_at = NULL
            WHERE rooms.deleted_at IS NOT NULL";
        let insert = sqlx::query(insert).bind(id).bind(name).bind(now).bind(maker);
        if insert.execute(&mut *tx).await?.rows_affected() > 0 {
            self.quotas
                .spend(&mut tx, maker, Spent { rooms: 1, ..Spent::default() }, now)
                .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// Tells everybody that a room is deleted.
    pub async fn deleted(&self, id: &str) -> Result<(), Refusal> {
        self.changed().await?;
        let gone = Event::Gone { room: id.into() };
        let room = self.channels.publish_passing(&super::channel(id), &gone).await;
        let lobby = self.channels.publish_json(LOBBY, &gone, None).await;
        if let Err(error) = room.and(lobby) {
            tracing::warn!(error, "pages were not told that a room is deleted; they see it when they are loaded again");
        }
        Ok(())
    }

    /// Reads the rooms again, here and in the other web apps.
    async fn changed(&self) -> Result<(), Refusal> {
        self.reload()
            .await
            .map_err(|error| Refusal::internal("the rooms cannot be read", error))?;
        let notice = bus::Message { subject: CHANGED.into(), ..bus::Message::default() };
        if let Err(error) = self.bus.publish(notice).await {
            tracing::warn!(%error, "other web apps were not told of a change of rooms; they look again soon");
        }
        Ok(())
    }

    async fn reload(&self) -> Result<()> {
        let _turn = self.reloading.lock().await;
        let select = "SELECT id, name, maker FROM rooms WHERE deleted_at IS NULL ORDER BY created_at, id";
        let rooms: Vec<(String, String, String)> = sqlx::query_as(select).fetch_all(self.db.read()).await?;
        let select = "SELECT id FROM rooms WHERE deleted_at IS NOT NULL ORDER BY deleted_at DESC LIMIT $1";
        let gone: Vec<(String,)> = sqlx::query_as(select).bind(GONE_MAX).fetch_all(self.db.read()).await?;
        let all = rooms
            .into_iter()
            .map(|(id, name, maker)| Made { room: Room { id, name }, maker })
            .collect();
        *self.known.write() = Known { all, gone: gone.into_iter().map(|(id,)| id).collect() };
        Ok(())
    }
}

/// What a channel and a path can carry: ASCII letters and digits, dashes between.
fn slug(name: &str) -> String {
    let mut slug = String::new();
    for c in name.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_alphanumeric() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_end_matches('-').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_what_a_path_can_carry() {
        assert_eq!(slug("Release  Planning 2"), "release-planning-2");
        assert_eq!(slug(" #ops! "), "ops");
        assert_eq!(slug("!!"), "");
    }
}
