//! The rooms. They are few, so every web app keeps them in memory, and reloads them when one of them changes a room.

use super::quotas::{Quotas, Refused, Spent};
use crate::channels::{self, Channels, LOBBY};
use crate::db::{Db, Result, now_ms};
use crate::rpc::Refusal;
use bus::{Bus, Subscription};
use parking_lot::RwLock;
use std::collections::HashSet;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::chat::{Event, Room};
use wire::realtime::ErrorCode;

/// The subject on which a web app notifies the others that the rooms have changed.
const CHANGED: &str = "beamline.webapp.v1.rooms";
/// The rooms are also reloaded this often, because a notification may be lost.
const RELOAD_EVERY: Duration = Duration::from_secs(10);
/// Longest name in bytes.
const NAME_MAX: usize = 48;
const ROOMS_MAX: usize = 500;
/// Maximum number of remembered deleted rooms. The page of a remembered room says that it was deleted.
const GONE_MAX: i64 = 1000;

pub struct Rooms {
    db: Db,
    bus: Bus,
    channels: Channels,
    quotas: Quotas,
    operators: Vec<String>,
    known: RwLock<Known>,
    /// Serializes reloads, so that an older result does not overwrite a newer one.
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

    /// Reloads the rooms after each change, until cancelled.
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
                tracing::warn!(%error, "cannot reload the rooms");
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

    /// Whether a room with this id was deleted.
    pub fn is_gone(&self, id: &str) -> bool {
        self.known.read().gone.contains(id)
    }

    pub fn is_operator(&self, user: &str) -> bool {
        self.operators.iter().any(|operator| operator == user)
    }

    /// Whether a user may delete a room and stop any answer in it: only its creator and operators may.
    pub fn manages(&self, user: &str, room: &str) -> bool {
        let made = |made: &Made| made.room.id == room && made.maker == user;
        self.is_operator(user) || self.known.read().all.iter().any(made)
    }

    /// Returns the room with this name, and creates it if there is none.
    pub async fn create(&self, name: &str, maker: &str) -> Result<Room, Refusal> {
        let name = name.trim().trim_start_matches('#');
        let id = slug(name);
        if id.is_empty() || id == "lobby" || name.len() > NAME_MAX || name.contains(char::is_control) {
            let text = format!(
                "a room's name has 1 to {NAME_MAX} bytes, at least one letter or digit, \
                 no control characters, and is not “lobby”"
            );
            return Err(Refusal::bad(text));
        }

        if let Some(known) = self.get(&id) {
            return Ok(known);
        }
        if self.known.read().all.len() >= ROOMS_MAX {
            let text = format!("there are {ROOMS_MAX} rooms, which is the limit; delete one first");
            return Err(Refusal(ErrorCode::LimitExceeded, text));
        }

        self.insert(&id, name, maker).await.map_err(|refused| match refused {
            Refused::Over(over) => over.into(),
            other => Refusal::internal("cannot store a room", other),
        })?;
        // Another web app may have created it, under another name.
        self.changed().await?;
        let room = self
            .get(&id)
            .ok_or_else(|| Refusal::again("the room has just been deleted; create it again"))?;

        let event = Event::Room { room: room.clone() };
        if let Err(error) = self.channels.publish_json(LOBBY, &event, None).await {
            tracing::warn!(error, "cannot announce a new room to open pages; they show it after a reload");
        }
        Ok(room)
    }

    /// Inserts a room, or replaces a deleted one with the same id. Does nothing if the room exists by now.
    async fn insert(&self, id: &str, name: &str, maker: &str) -> Result<(), Refused> {
        let now = now_ms();
        let mut tx = self.db.begin().await?;

        // An existing room stays unchanged, and then no row is affected.
        let insert =
            "INSERT INTO rooms (id, name, created_at, maker) VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO UPDATE
            SET name = excluded.name, created_at = excluded.created_at, maker = excluded.maker, deleted_at = NULL
            WHERE rooms.deleted_at IS NOT NULL";
        let insert = sqlx::query(insert).bind(id).bind(name).bind(now).bind(maker);
        if insert.execute(&mut *tx).await?.rows_affected() > 0 {
            // In the same transaction: if the quota is exceeded, the room is not created.
            let spent = Spent { rooms: 1, ..Spent::default() };
            self.quotas.spend(&mut tx, maker, spent, now).await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// Announces that a room was deleted: to all web apps, to the room and to the lobby.
    pub async fn deleted(&self, id: &str) -> Result<(), Refusal> {
        self.changed().await?;

        let gone = Event::Gone { room: id.into() };
        let room = self.channels.publish_passing(&channels::of_room(id), &gone).await;
        let lobby = self.channels.publish_json(LOBBY, &gone, None).await;
        if let Err(error) = room.and(lobby) {
            tracing::warn!(error, "cannot announce a deleted room to open pages; they hide it after a reload");
        }
        Ok(())
    }

    /// Reloads the rooms, and notifies the other web apps so that they reload too.
    async fn changed(&self) -> Result<(), Refusal> {
        self.reload()
            .await
            .map_err(|error| Refusal::internal("cannot read the rooms", error))?;

        let notice = bus::Message { subject: CHANGED.into(), ..bus::Message::default() };
        if let Err(error) = self.bus.publish(notice).await {
            tracing::warn!(%error, "cannot notify other web apps that the rooms changed; they reload within 10 s");
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

/// Derives a room's id from its name: ASCII letters and digits, separated by single dashes, which are valid in channels
/// and paths.
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
    fn room_id_is_made_of_letters_digits_and_dashes() {
        assert_eq!(slug("Release  Planning 2"), "release-planning-2");
        assert_eq!(slug(" #ops! "), "ops");
        assert_eq!(slug("!!"), "");
    }
}
