//! Live web apps: a function per page, run again on each interaction of a session; only the difference is sent.

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

/// What a page may fail with; its text is shown on the page.
pub type PageError = Box<dyn std::error::Error + Send + Sync>;
type PageFn = dyn Fn(&mut Ui<'_>) -> Result<(), PageError> + Send + Sync;

/// Pages by path, and the data they share. Page functions must not block: they run where connections are served.
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

    /// Path as `/rooms/{room}`; a page's function reads `room` with [`Ui::param`].
    #[must_use]
    pub fn page<F>(mut self, path: &str, page: F) -> Self
    where
        F: Fn(&mut Ui<'_>) -> Result<(), PageError> + Send + Sync + 'static,
    {
        self.pages.push((Pattern::new(path), Arc::new(page)));
        self
    }

    /// Shown where no page is; without one, a page that says so.
    #[must_use]
    pub fn fallback<F>(mut self, page: F) -> Self
    where
        F: Fn(&mut Ui<'_>) -> Result<(), PageError> + Send + Sync + 'static,
    {
        self.fallback = Some(Arc::new(page));
        self
    }

    /// Shared with every page, which reads it with [`Ui::data`].
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

/// Percent-encoding undone; what is not valid stays as it is.
fn decode(part: &str) -> String {
    let bytes = part.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
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
    fn the_fallback_is_where_no_page_is() {
        let app = App::new().page("/a/{b}", |_| Ok(()));
        assert!(app.find("/b").is_none());
        let app = app.fallback(|_| Ok(()));
        let params = |path: &str| app.find(path).unwrap().1;
        assert_eq!(params("/a/c"), [("b".into(), "c".into())]);
        assert_eq!(params("/b"), []);
    }

    #[test]
    fn a_path_finds_its_page_and_parameters() {
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
