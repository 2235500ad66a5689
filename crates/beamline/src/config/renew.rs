//! What another look at the settings changes in a process that runs.

use super::{KEYS, Settings, Value, Values};

/// Names of settings that are not what they were.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub taken: Vec<&'static str>,
    /// In force after a restart only.
    pub waiting: Vec<&'static str>,
}

impl Settings {
    /// Takes over what may change while we run, and names what may not.
    pub fn renew(&mut self, fresh: Self) -> Changes {
        let mut changes = Changes::default();
        for key in KEYS {
            let [old, new] = [&self.values, &fresh.values].map(|values| values.0.get(key.name).map(|(value, _)| value));
            match (old != new, key.live) {
                (false, _) => {}
                (true, true) => changes.taken.push(key.name),
                (true, false) => changes.waiting.push(key.name),
            }
            if key.live
                && let Some(value) = fresh.values.0.get(key.name)
            {
                self.values.0.insert(key.name, value.clone());
            }
        }
        let tables = [
            ("worker.providers", plain(&self.providers).eq(plain(&fresh.providers))),
            ("cluster.namespaces", plain(&self.namespaces).eq(plain(&fresh.namespaces))),
            ("cluster.defaults", plain(&self.namespace_defaults).eq(plain(&fresh.namespace_defaults))),
        ];
        changes
            .waiting
            .extend(tables.iter().filter(|(_, same)| !same).map(|(name, _)| *name));
        changes
    }
}

/// Without the lines that they stand on.
fn plain<'a>(tables: impl IntoIterator<Item = &'a Values>) -> impl Iterator<Item = Vec<(&'a str, &'a Value)>> {
    tables
        .into_iter()
        .map(|table| table.0.iter().map(|(name, (value, _))| (*name, value)).collect())
}

#[cfg(test)]
mod tests {
    use crate::config::{Layers, Settings, load};

    fn read(text: &str) -> Settings {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("beamline.toml");
        std::fs::write(&path, text).unwrap();
        load(&Layers { file: Some(path), ..Layers::default() }).unwrap()
    }

    #[test]
    fn limits_are_taken_over_and_the_rest_waits() {
        let mut settings = read("[gateway]\nmax_in_flight = 5\nsocket = \"/a\"\n");
        let fresh = "[gateway]\nmax_in_flight = 7\nsocket = \"/b\"\n[log]\nlevel = \"debug\"\n[worker]\nslots = 3\n\
                     [[worker.providers]]\nname = \"x\"\nkind = \"echo\"\n";
        for (again, taken) in [(false, &["gateway.max_in_flight", "log.level"][..]), (true, &[])] {
            let changes = settings.renew(read(fresh));
            assert_eq!(changes.taken, taken, "again: {again}");
            assert_eq!(changes.waiting, ["gateway.socket", "worker.slots", "worker.providers"], "again: {again}");
        }
        assert_eq!(settings.values.count("gateway.max_in_flight"), 7);
        assert_eq!(settings.values.path("gateway.socket").to_str(), Some("/a"));
        // Back to the default, as it is no longer there.
        assert_eq!(settings.renew(read("[gateway]\nsocket = \"/a\"\n")).waiting, [""; 0]);
        assert_eq!(settings.values.count("gateway.max_in_flight"), 1000);
    }

    #[test]
    fn only_the_same_lines_elsewhere_in_the_file_change_nothing() {
        let mut settings = read("[[worker.providers]]\nname = \"x\"\nkind = \"echo\"\n");
        let moved = read("# a comment\n\n[[worker.providers]]\nkind = \"echo\"\nname = \"x\"\n");
        assert_eq!(settings.renew(moved), super::Changes::default());
    }
}
