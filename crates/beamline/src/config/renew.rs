//! SIGHUP: applies the changed settings that a running process can change, and lists those that need a restart.

use super::credentials::API_KEYS_FILE;
use super::keys::KEYS;
use super::problems::Problems;
use super::settings::Settings;
use super::tables::Values;
use super::typed;
use super::value::Value;

/// Keys of settings that differ between the running process and the files.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Applied by the reload.
    pub applied: Vec<&'static str>,
    /// Applied only by a restart.
    pub needs_restart: Vec<&'static str>,
}

impl Settings {
    /// Takes the live settings from `fresh`. Fails and changes nothing if they conflict with the other settings.
    pub fn renew(&mut self, fresh: &Self) -> Result<Changes, Problems> {
        let mut changes = Changes::default();
        let mut tables = self.tables.clone();
        let fresh = &fresh.tables;

        for key in KEYS {
            let differs = tables.values.value(key.name) != fresh.values.value(key.name);
            match (differs, key.live) {
                (false, _) => {}
                (true, true) => changes.applied.push(key.name),
                (true, false) => changes.needs_restart.push(key.name),
            }
            if key.live {
                tables.values.take_over(key, &fresh.values);
            }
        }

        if tables.key_lines != fresh.key_lines {
            tables.key_lines.clone_from(&fresh.key_lines);
            if !changes.applied.contains(&API_KEYS_FILE) {
                changes.applied.push(API_KEYS_FILE);
            }
        }

        let repeated = [
            ("worker.providers", plain(&tables.providers).eq(plain(&fresh.providers))),
            ("cluster.namespaces", plain(&tables.namespaces).eq(plain(&fresh.namespaces))),
            ("cluster.defaults", plain(&tables.namespace_defaults).eq(plain(&fresh.namespace_defaults))),
        ];
        let differing = repeated.iter().filter(|(_, same)| !same).map(|(name, _)| *name);
        changes.needs_restart.extend(differing);

        *self = typed(tables, Problems::default())?;
        Ok(changes)
    }
}

/// The values without their sources, because an entry that only moved within the file has not changed.
fn plain<'a>(tables: impl IntoIterator<Item = &'a Values>) -> impl Iterator<Item = Vec<(&'a str, &'a Value)>> {
    tables.into_iter().map(|table| table.without_sources().collect())
}

#[cfg(test)]
mod tests {
    use crate::config::Settings;
    use crate::config::testing::load_file;
    use std::path::Path;

    fn read(text: &str) -> Settings {
        load_file(text).unwrap()
    }

    #[test]
    fn live_settings_are_applied_and_the_others_need_a_restart() {
        let mut settings = read("[gateway]\nmax_in_flight = 5\nsocket = \"/a\"\n");
        let fresh = "[gateway]\nmax_in_flight = 7\nsocket = \"/b\"\n[log]\nlevel = \"debug\"\n[worker]\nslots = 3\n\
                     [[worker.providers]]\nname = \"x\"\nkind = \"echo\"\n";
        for (again, taken) in [(false, &["gateway.max_in_flight", "log.level"][..]), (true, &[])] {
            let changes = settings.renew(&read(fresh)).unwrap();
            assert_eq!(changes.applied, taken, "again: {again}");
            assert_eq!(changes.needs_restart, ["gateway.socket", "worker.slots", "worker.providers"], "again: {again}");
        }
        assert_eq!(settings.gateway.max_in_flight, 7);
        assert_eq!(settings.gateway.socket, Path::new("/a"));

        // A setting that is no longer in the file returns to its default.
        let changes = settings.renew(&read("[gateway]\nsocket = \"/a\"\n")).unwrap();
        assert_eq!(changes.needs_restart, [""; 0]);
        assert_eq!(settings.gateway.max_in_flight, 1000);
    }

    #[test]
    fn live_setting_without_a_default_becomes_unset_again() {
        let mut settings = read("[gateway]\nmax_in_flight_per_user = 5\n");
        let changes = settings.renew(&read("")).unwrap();
        assert_eq!(changes.applied, ["gateway.max_in_flight_per_user"]);
        assert_eq!(settings.gateway.max_in_flight_per_user, None);
        assert_eq!(settings.renew(&read("")).unwrap(), super::Changes::default());
    }

    #[test]
    fn entries_that_move_within_the_file_are_no_change() {
        let mut settings = read("[[worker.providers]]\nname = \"x\"\nkind = \"echo\"\n");
        let moved = read("# a comment\n\n[[worker.providers]]\nkind = \"echo\"\nname = \"x\"\n");
        assert_eq!(settings.renew(&moved).unwrap(), super::Changes::default());
    }
}
