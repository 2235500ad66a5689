//! The rooms, few enough to keep in memory; every web app reloads when one of them makes a room.

use crate::channels::{Channels, LOBBY};
use crate::db::{Db, Result, now_ms};
use crate::rpc::Refusal;
use bus::{Bus, Subscription};
use parking_lot::RwLock;
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

pub struct Rooms {
    db: Db,
    bus: Bus,
    channels: Channels,
    all: RwLock<Vec<Room>>,
    /// One at a time: what was read first must not overwrite what was read later.
    reloading: tokio::sync::Mutex<()>,
}

impl Rooms {
    pub async fn load(db: Db, bus: Bus, channels: Channels) -> Result<Self> {
        let rooms = Self { db, bus, channels, all: RwLock::default(), reloading: tokio::sync::Mutex::default() };
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
        self.all.read().clone()
    }

    pub fn get(&self, id: &str) -> Option<Room> {
        self.all.read().iter().find(|room| room.id == id).cloned()
    }

    /// The room of this name, made now if there is none.
    pub async fn create(&self, name: &str) -> Result<Room, Refusal> {
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
        if self.all.read().len() >= ROOMS_MAX {
            return Err(Refusal(
                ErrorCode::LimitExceeded,
                format!("there are {ROOMS_MAX} rooms, the most there can be"),
            ));
        }
        let insert = "INSERT INTO rooms (id, name, created_at) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING";
        let insert = sqlx::query(insert).bind(&id).bind(name).bind(now_ms()).execute(self.db.write()).await;
        insert.map_err(Refusal::internal)?;
        self.reload().await.map_err(Refusal::internal)?;
        let room = self.get(&id).ok_or_else(|| Refusal::internal("the room was not found again"))?;
        let notice = bus::Message { subject: CHANGED.into(), ..bus::Message::default() };
        if let Err(error) = self.bus.publish(notice).await {
            tracing::warn!(%error, "other web apps were not told of a new room; they look again soon");
        }
        let told = self.channels.publish_json(LOBBY, &Event::Room { room: room.clone() }, None).await;
        if let Err(error) = told {
            tracing::warn!(error, "pages were not told of a new room; they see it when they are loaded again");
        }
        Ok(room)
    }

    async fn reload(&self) -> Result<()> {
        let _turn = self.reloading.lock().await;
        let rooms: Vec<(String, String)> =
            sqlx::query_as("SELECT id, name FROM rooms ORDER BY created_at, id").fetch_all(self.db.read()).await?;
        *self.all.write() = rooms.into_iter().map(|(id, name)| Room { id, name }).collect();
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
