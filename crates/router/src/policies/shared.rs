//! The last good version of every policy, in a bucket of the bus. It survives restarts, and all routers share it.

use super::files::Name;
use super::source::{self, Version};
use bus::{Bus, Error, Result};
use std::collections::BTreeMap;
use wire::policy::{Entry, Index, Stored};
use wire::subjects::{BUCKET_POLICIES, POLICIES_INDEX};

/// Attempts to write the index. Routers that start together write it at the same time.
const WRITE_TRIES: usize = 32;

pub struct Shared {
    bus: Bus,
}

impl Shared {
    pub fn new(bus: Bus) -> Self {
        Self { bus }
    }

    /// The policies that exist and existed; `None` if there has never been a policy directory.
    pub async fn index(&self) -> Result<Option<Index>> {
        Ok(self.read_index().await?.map(|(index, _)| index))
    }

    async fn read_index(&self) -> Result<Option<(Index, u64)>> {
        let Some((bytes, revision)) = self.bus.kv_get(BUCKET_POLICIES, POLICIES_INDEX).await? else {
            return Ok(None);
        };
        let index = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Storage(format!("the index of policies cannot be read: {error}")))?;
        Ok(Some((index, revision)))
    }

    pub async fn store(&self, name: &Name, version: &Version) -> Result<()> {
        let value = serde_json::to_vec(&version.source)
            .expect("a policy serializes to JSON")
            .into();
        self.bus
            .kv_put(BUCKET_POLICIES, &name.to_string(), value, None)
            .await
            .map(drop)
    }

    /// Overwrites the stored version of a deleted policy with nothing.
    pub async fn erase(&self, name: &Name) -> Result<()> {
        self.bus
            .kv_put(BUCKET_POLICIES, &name.to_string(), "".into(), None)
            .await
            .map(drop)
    }

    /// The version that was stored last, or why it cannot be used; a newer program may have stored it.
    pub async fn fetch(&self, name: &Name) -> Result<std::result::Result<Version, String>> {
        let at = format!("the stored version of {name}");
        let Some((bytes, _)) = self.bus.kv_get(BUCKET_POLICIES, &name.to_string()).await? else {
            return Ok(Err(format!("{at} is missing")));
        };
        let stored = serde_json::from_slice::<Stored>(&bytes).map_err(|error| format!("{at} cannot be read: {error}"));
        Ok(stored.and_then(|stored| source::compile(&at, &name.policy, stored)))
    }

    /// Writes these entries to the index, and creates the index if there is none. A deletion does not replace a newer
    /// entry.
    pub async fn publish(&self, changes: &BTreeMap<Name, Entry>) -> Result<Index> {
        for _ in 0..WRITE_TRIES {
            let (mut index, revision) = self.read_index().await?.unwrap_or_default();
            let before = (revision > 0).then(|| index.clone());

            for (name, entry) in changes {
                let known = index.policies.entry(name.to_string()).or_insert_with(|| entry.clone());
                if !entry.deleted || known.at_ms <= entry.at_ms {
                    *known = entry.clone();
                }
            }
            if before.as_ref() == Some(&index) {
                return Ok(index);
            }

            let value = serde_json::to_vec(&index).expect("an index serializes to JSON").into();
            match self
                .bus
                .kv_put(BUCKET_POLICIES, POLICIES_INDEX, value, Some(revision))
                .await
            {
                Ok(_) => return Ok(index),
                // Another router wrote it in the meantime.
                Err(Error::WrongRevision(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::WrongRevision(POLICIES_INDEX.into()))
    }
}
