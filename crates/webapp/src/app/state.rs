//! The state of a session between runs: the values of widgets, and typed state. Both survive a restart as JSON.

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::any::{Any, type_name};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Beyond this many values, those of widgets that are not on the page are evicted.
const WIDGETS_MAX: usize = 1000;

#[derive(Default)]
pub struct Memory {
    pub widgets: BTreeMap<String, Json>,
    states: HashMap<&'static str, Box<dyn Slot>>,
    /// Restored states that no run has used yet, by type name.
    dormant: BTreeMap<String, Json>,
}

/// A cheap handle on a value of the session.
pub struct State<T>(Arc<Mutex<T>>);

impl<T: Clone> State<T> {
    pub fn get(&self) -> T {
        self.0.lock().clone()
    }
}

impl<T> State<T> {
    pub fn set(&self, value: T) {
        *self.0.lock() = value;
    }

    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.0.lock())
    }
}

trait Slot: Send {
    fn to_json(&self) -> Json;
    fn as_any(&self) -> &dyn Any;
}

impl<T: Serialize + Send + 'static> Slot for Arc<Mutex<T>> {
    fn to_json(&self) -> Json {
        serde_json::to_value(&*self.lock()).unwrap_or(Json::Null)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Default, Serialize, Deserialize)]
pub struct Snapshot {
    pub path: String,
    pub query: String,
    widgets: BTreeMap<String, Json>,
    states: BTreeMap<String, Json>,
}

impl Memory {
    pub fn state<T>(&mut self) -> State<T>
    where
        T: Default + Serialize + DeserializeOwned + Send + 'static,
    {
        let name = type_name::<T>();
        let dormant = &mut self.dormant;
        let slot = self.states.entry(name).or_insert_with(|| {
            // If a newer version has changed the type, the state starts over.
            let restored = dormant
                .remove(name)
                .and_then(|json| serde_json::from_value::<T>(json).ok());
            Box::new(Arc::new(Mutex::new(restored.unwrap_or_default())))
        });
        let typed = slot
            .as_any()
            .downcast_ref::<Arc<Mutex<T>>>()
            .expect("a type name belongs to one type");
        State(typed.clone())
    }

    /// If there are too many values, evicts those of widgets that the last run did not show.
    pub fn prune(&mut self, shown: impl Fn(&str) -> bool) {
        if self.widgets.len() > WIDGETS_MAX {
            self.widgets.retain(|key, _| shown(key));
        }
    }

    pub fn snapshot(&self, path: &str, query: &str) -> Snapshot {
        // States that no run has used are saved as they were restored.
        let mut states = self.dormant.clone();
        states.extend(
            self.states
                .iter()
                .map(|(name, slot)| ((*name).to_string(), slot.to_json())),
        );
        Snapshot {
            path: path.into(),
            query: query.into(),
            widgets: self.widgets.clone(),
            states,
        }
    }

    pub fn restore(snapshot: Snapshot) -> Self {
        Self {
            widgets: snapshot.widgets,
            states: HashMap::new(),
            dormant: snapshot.states,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default, Serialize, Deserialize, Clone, PartialEq, Debug)]
    struct Counter(u32);

    #[test]
    fn unused_state_survives_two_restarts() {
        let mut memory = Memory::default();
        memory.state::<Counter>().update(|counter| counter.0 += 3);
        memory.widgets.insert("k".into(), Json::from("v"));
        let once = Memory::restore(memory.snapshot("/", ""));
        let mut twice = Memory::restore(once.snapshot("/", ""));
        assert_eq!(twice.state::<Counter>().get(), Counter(3));
        assert_eq!(twice.widgets["k"], "v");
    }
}
