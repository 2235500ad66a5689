//! Live web apps: a page is a function that runs again on each interaction of a session. Only the difference is sent.

mod href;
mod input;
mod portions;
pub mod sessions;
mod state;
mod stored;
pub mod ui;
mod view;

pub use state::State;
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::Arc;
pub use ui::{Column, Series, Tone, Ui};

/// The error of a page function. The page shows its text, unless it came from the database.
pub type PageError = Box<dyn std::error::Error + Send + Sync>;
type PageFn = dyn Fn(&mut Ui<'_>) -> Result<(), PageError> + Send + Sync;

/// Pages by path, and the data they share. Page functions must not block, since they run on the threads that serve
/// connections.
#[derive(Default)]
pub struct App {
    pages: Vec<(Pattern, Arc<PageFn>)>,
    fallback: Option<Arc<PageFn>>,
    data: HashMap<TypeId, Arc<dyn Any + Send + Sync>>,
}

impl App {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a page. With the path `/rooms/{room}`, its function reads the room with [`Ui::param`].
    #[must_use]
    pub fn page<F>(mut self, path: &str, page: F) -> Self
    where
        F: Fn(&mut Ui<'_>) -> Result<(), PageError> + Send + Sync + 'static,
    {
        self.pages.push((Pattern::new(path), Arc::new(page)));
        self
    }

    /// Sets the page for all other paths. Without it, they show a plain "not found".
    #[must_use]
    pub fn fallback<F>(mut self, page: F) -> Self
    where
        F: Fn(&mut Ui<'_>) -> Result<(), PageError> + Send + Sync + 'static,
    {
        self.fallback = Some(Arc::new(page));
        self
    }

    /// Shares data with all pages, which read it with [`Ui::data`].
    #[must_use]
    pub fn data<T: Send + Sync + 'static>(mut self, data: Arc<T>) -> Self {
        self.data.insert(TypeId::of::<T>(), data);
        self
    }

    fn find(&self, path: &str) -> Option<(&Arc<PageFn>, Vec<(String, String)>)> {
        let found = self
            .pages
            .iter()
            .find_map(|(pattern, page)| Some((page, pattern.matches(path)?)));
        found.or_else(|| Some((self.fallback.as_ref()?, Vec::new())))
    }
}

struct Pattern(Vec<Segment>);

enum Segment {
    Exact(String),
    Param(String),
}

impl Pattern {
    fn new(path: &str) -> Self {
        let segment = |text: &str| match text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) {
            Some(name) => Segment::Param(name.into()),
            None => Segment::Exact(text.into()),
        };
        Self(split(path).map(segment).collect())
    }

    fn matches(&self, path: &str) -> Option<Vec<(String, String)>> {
        let mut params = Vec::new();
        let mut parts = split(path);
        for segment in &self.0 {
            let part = parts.next()?;
            match segment {
                Segment::Exact(text) if text == part => {}
                Segment::Exact(_) => return None,
                Segment::Param(name) => params.push((name.clone(), decode(part))),
            }
        }
        parts.next().is_none().then_some(params)
    }
}

fn split(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

/// Decodes percent-encoding. Invalid sequences stay as they are.
fn decode(part: &str) -> String {
    let bytes = part.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());

    let mut i = 0;
    while i < bytes.len() {
        // `get`, since the two digits may be cut off or inside a character.
        let hex = (bytes[i] == b'%').then(|| part.get(i + 1..i + 3)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fallback_serves_paths_without_a_page() {
        let app = App::new().page("/a/{b}", |_| Ok(()));
        assert!(app.find("/b").is_none());
        let app = app.fallback(|_| Ok(()));
        let params = |path: &str| app.find(path).unwrap().1;
        assert_eq!(params("/a/c"), [("b".into(), "c".into())]);
        assert_eq!(params("/b"), []);
    }

    #[test]
    fn path_is_matched_with_its_parameters() {
        let found = |pattern: &str, path: &str| Pattern::new(pattern).matches(path);
        assert_eq!(found("/", "/"), Some(vec![]));
        assert_eq!(found("/console", "/console/"), Some(vec![]));
        assert_eq!(found("/rooms/{room}", "/rooms/caf%C3%A9"), Some(vec![("room".into(), "café".into())]));
        assert_eq!(found("/rooms/{room}", "/rooms/a%zz%"), Some(vec![("room".into(), "a%zz%".into())]));
        for path in ["/rooms", "/rooms/a/b", "/room/a"] {
            assert_eq!(found("/rooms/{room}", path), None, "{path}");
        }
    }
}
