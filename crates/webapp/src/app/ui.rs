//! The interface of page functions. Widgets return their value; layout elements take closures.

use super::state::{Memory, State};
use super::{App, href};
use crate::channels;
use crate::tree::Element;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use std::any::{TypeId, type_name};
use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Maximum elements of one page. A run that builds more fails.
pub const ELEMENTS_MAX: usize = 5_000;

/// The user and the path of a visit.
#[derive(Debug, Clone, Default)]
pub struct Visit {
    pub user: String,
    pub name: String,
    pub path: String,
    pub query: String,
    pub params: Vec<(String, String)>,
}

/// The effects of a run besides its elements.
#[derive(Debug, Default)]
pub struct Effects {
    pub navigate: Option<String>,
    pub toasts: Vec<(Tone, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Ok,
    Warn,
    Bad,
    Info,
    Muted,
}

impl Tone {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Bad => "bad",
            Self::Info => "info",
            Self::Muted => "muted",
        }
    }
}

/// One line of a live chart.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Series {
    /// A dotted path into each sample.
    pub path: &'static str,
    pub label: &'static str,
    /// Whether the value is a total. The chart then shows its change per second.
    pub rate: bool,
}

/// A column of a table.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Column {
    /// The field of a row that the column shows.
    pub key: &'static str,
    pub label: &'static str,
    /// `int`, `bytes`, `percent`, `ms`, `us`, `duration` or `badge`; empty to show the value as it is.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub format: &'static str,
}

/// An option of a select box.
#[derive(Debug, Clone, Copy, Serialize)]
struct Choice<'a> {
    value: &'a str,
    label: &'a str,
}

pub struct Ui<'a> {
    app: &'a App,
    visit: &'a Visit,
    memory: &'a mut Memory,
    clicked: &'a HashSet<String>,
    effects: Effects,
    /// The children of the open element, as built so far.
    siblings: Vec<Element>,
    /// The path of the open element, with which the names of its widgets begin.
    scope: String,
    /// How many children of each kind the open element has.
    counts: HashMap<&'static str, usize>,
    next_key: Option<String>,
    built: usize,
    /// The first error of the page function.
    problem: Option<String>,
}

impl<'a> Ui<'a> {
    pub(super) fn new(app: &'a App, visit: &'a Visit, memory: &'a mut Memory, clicked: &'a HashSet<String>) -> Self {
        Self {
            app,
            visit,
            memory,
            clicked,
            effects: Effects::default(),
            siblings: Vec::new(),
            scope: visit.path.clone(),
            counts: HashMap::new(),
            next_key: None,
            built: 0,
            problem: None,
        }
    }

    /// Returns the elements and effects; fails if there are too many elements or the page function made an error.
    pub(super) fn finish(self) -> Result<(Vec<Element>, Effects), String> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        if self.built > ELEMENTS_MAX {
            return Err(format!("the page has {} elements; at most {ELEMENTS_MAX} are allowed", self.built));
        }
        Ok((self.siblings, self.effects))
    }

    // The session: its user, place and data.

    pub fn user(&self) -> &str {
        &self.visit.user
    }

    pub fn user_name(&self) -> &str {
        &self.visit.name
    }

    pub fn path(&self) -> &str {
        &self.visit.path
    }

    /// The value of a parameter that the page's path names.
    pub fn param(&self, name: &str) -> Option<&str> {
        self.visit
            .params
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn query(&self) -> &str {
        &self.visit.query
    }

    /// The data of this type, as given to [`App::data`].
    ///
    /// # Panics
    /// If the app has no data of this type. The panic fails the run; the session continues.
    pub fn data<T: Send + Sync + 'static>(&self) -> Arc<T> {
        let data = self.app.data.get(&TypeId::of::<T>());
        let data =
            data.unwrap_or_else(|| panic!("the app has no data of type {}; give it with App::data", type_name::<T>()));
        data.clone().downcast().expect("data is stored under its own type")
    }

    /// The session's value of type `T`. It survives runs and restarts.
    pub fn state<T: Default + Serialize + DeserializeOwned + Send + 'static>(&mut self) -> State<T> {
        self.memory.state()
    }

    /// Sends the user to a path inside the app, such as `/console?tab=1`. Any other address fails the run.
    pub fn navigate(&mut self, path: impl Into<String>) {
        let path = path.into();
        if href::is_internal(&path) {
            self.effects.navigate = Some(path);
        } else {
            self.problem.get_or_insert(format!(
                "cannot navigate to {path:?}: a path inside the app starts with exactly one slash"
            ));
        }
    }

    pub fn toast(&mut self, tone: Tone, text: impl Into<String>) {
        self.effects.toasts.push((tone, text.into()));
    }

    /// Gives the next element a key. With it, the element keeps its state when it moves among its siblings.
    pub fn key(&mut self, key: impl Into<String>) -> &mut Self {
        self.next_key = Some(key.into());
        self
    }

    // Layout.

    /// The whole page, with its title.
    pub fn page<R>(&mut self, title: &str, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("page").text("title", title), build)
    }

    pub fn sidebar<R>(&mut self, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("sidebar"), build)
    }

    pub fn main<R>(&mut self, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("main"), build)
    }

    pub fn row<R>(&mut self, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("container").text("direction", "row").flag("wrap", true), build)
    }

    pub fn container<R>(&mut self, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("container").text("direction", "column"), build)
    }

    /// One column for each weight. Build them with [`Self::column`].
    pub fn columns<R>(&mut self, weights: &[u32], build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("columns").json("weights", weights), build)
    }

    pub fn column<R>(&mut self, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("column"), build)
    }

    pub fn card<R>(&mut self, title: &str, hint: &str, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("card").text("title", title).text("hint", hint), build)
    }

    pub fn expander<R>(&mut self, label: &str, build: impl FnOnce(&mut Self) -> R) -> R {
        self.nest(Element::new("expander").text("label", label), build)
    }

    /// Builds the chosen tab only, and returns its index.
    pub fn tabs(&mut self, labels: &[&str], build: impl FnOnce(&mut Self, usize)) -> usize {
        let (key, value) = self.widget("tabs", 0.into());
        let chosen = usize::try_from(value.as_u64().unwrap_or(0))
            .unwrap_or(0)
            .min(labels.len().saturating_sub(1));
        let element = Element::new("tabs")
            .number("value", chosen as f64)
            .json("labels", labels);

        self.nest(Element { widget: key, ..element }, |ui| {
            // A key for each tab, so that a different tab is a different element, not the same one with new contents.
            ui.key(labels.get(chosen).copied().unwrap_or_default());
            ui.nest(Element::new("tab"), |ui| build(ui, chosen));
        });
        chosen
    }

    /// Widgets whose values are sent together. Returns true in the run after the form was submitted.
    pub fn form<R>(&mut self, submit: &str, build: impl FnOnce(&mut Self) -> R) -> (bool, R) {
        let key = self.widget_key("form");
        let submitted = self.clicked.contains(&key);
        let element = Element { widget: key, ..Element::new("form").text("submit", submit) };
        (submitted, self.nest(element, build))
    }

    fn nest<R>(&mut self, mut element: Element, build: impl FnOnce(&mut Self) -> R) -> R {
        let place = self.place(element.kind);
        element.key = self.next_key.take().unwrap_or_default();
        // `build` adds its elements to the fields of this Ui, so set those of the outer element aside.
        let siblings = std::mem::take(&mut self.siblings);
        let counts = std::mem::take(&mut self.counts);
        let outer = self.scope.len();
        self.scope.push('/');
        self.scope.push_str(&place);

        let result = build(self);

        self.scope.truncate(outer);
        self.counts = counts;
        element.children = std::mem::replace(&mut self.siblings, siblings);
        self.push(element);
        result
    }

    /// Returns what identifies the next element among its siblings: its kind with its key or its count.
    fn place(&mut self, kind: &'static str) -> String {
        // Counted by kind, so that names are stable when elements of other kinds are added or removed.
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        match &self.next_key {
            Some(key) => format!("{kind}={key}"),
            None => format!("{kind}{count}"),
        }
    }

    fn push(&mut self, element: Element) {
        self.built += 1;
        // Elements beyond the limit are still counted, for the error.
        if self.built <= ELEMENTS_MAX {
            self.siblings.push(element);
        }
    }

    fn show(&mut self, mut element: Element) {
        element.key = self.next_key.take().unwrap_or_default();
        self.push(element);
    }

    // Elements that display values.

    /// `level` is 1 to 4.
    pub fn heading(&mut self, level: u8, text: impl Into<String>) {
        self.show(
            Element::new("heading")
                .number("level", f64::from(level))
                .text("text", text),
        );
    }

    pub fn text(&mut self, text: impl Into<String>) {
        self.show(Element::new("text").text("text", text));
    }

    pub fn muted(&mut self, text: impl Into<String>) {
        self.show(Element::new("text").text("text", text).text("tone", "muted"));
    }

    pub fn markdown(&mut self, text: impl Into<String>) {
        self.show(Element::new("markdown").text("text", text));
    }

    pub fn code(&mut self, lang: &str, text: impl Into<String>) {
        self.show(Element::new("code").text("text", text).text("lang", lang));
    }

    pub fn json(&mut self, value: Json) {
        self.show(Element::new("json").json("value", value));
    }

    pub fn table(&mut self, columns: &[Column], rows: Json) {
        self.show(Element::new("table").json("columns", columns).json("rows", rows));
    }

    pub fn metric(&mut self, label: &str, value: impl Into<String>, unit: &str) {
        self.show(
            Element::new("metric")
                .text("label", label)
                .text("value", value)
                .text("unit", unit),
        );
    }

    pub fn badge(&mut self, tone: Tone, text: impl Into<String>) {
        self.show(Element::new("badge").text("text", text).text("tone", tone.as_str()));
    }

    pub fn alert(&mut self, tone: Tone, title: &str, text: impl Into<String>) {
        self.show(
            Element::new("alert")
                .text("tone", tone.as_str())
                .text("title", title)
                .text("text", text),
        );
    }

    pub fn empty(&mut self, title: &str, hint: &str) {
        self.show(Element::new("empty").text("title", title).text("hint", hint));
    }

    pub fn divider(&mut self) {
        self.show(Element::new("divider"));
    }

    /// A link. It is shown as active if `href` is the current path.
    pub fn link(&mut self, href: &str, label: &str) {
        if !href::is_safe(href) {
            let problem = format!("a link cannot lead to {href:?}; it must start with one slash, https:// or mailto:");
            self.problem.get_or_insert(problem);
        }

        let active = self.visit.path == href;
        self.show(
            Element::new("link")
                .text("href", href)
                .text("label", label)
                .flag("active", active),
        );
    }

    /// `value` is 0.0 to 1.0.
    pub fn progress(&mut self, label: &str, value: f64) {
        self.show(
            Element::new("progress")
                .number("value", value.clamp(0.0, 1.0))
                .text("label", label),
        );
    }

    // Widgets.

    /// Returns true in the run after a click.
    pub fn button(&mut self, label: &str) -> bool {
        let key = self.widget_key("button");
        let clicked = self.clicked.contains(&key);
        self.show(Element { widget: key, ..Element::new("button").text("label", label) });
        clicked
    }

    pub fn text_input(&mut self, label: &str, default: &str) -> String {
        self.text_widget(Element::new("text_input").text("label", label), default)
    }

    pub fn text_area(&mut self, label: &str, default: &str) -> String {
        self.text_widget(Element::new("text_area").text("label", label), default)
    }

    fn text_widget(&mut self, element: Element, default: &str) -> String {
        let (widget, value) = self.widget(element.kind, default.into());
        let value = value.as_str().unwrap_or(default).to_string();
        self.show(Element { widget, ..element.text("value", &value) });
        value
    }

    pub fn number_input(&mut self, label: &str, range: RangeInclusive<f64>, default: f64) -> f64 {
        self.number_widget(Element::new("number_input").text("label", label), &range, default)
    }

    pub fn slider(&mut self, label: &str, range: RangeInclusive<f64>, default: f64) -> f64 {
        self.number_widget(Element::new("slider").text("label", label), &range, default)
    }

    fn number_widget(&mut self, element: Element, range: &RangeInclusive<f64>, default: f64) -> f64 {
        let (widget, value) = self.widget(element.kind, default.into());
        let value = value.as_f64().unwrap_or(default).max(*range.start()).min(*range.end());
        let element = element
            .number("value", value)
            .number("min", *range.start())
            .number("max", *range.end());
        self.show(Element { widget, ..element });
        value
    }

    pub fn checkbox(&mut self, label: &str, default: bool) -> bool {
        self.flag_widget(Element::new("checkbox").text("label", label), default)
    }

    pub fn toggle(&mut self, label: &str, default: bool) -> bool {
        self.flag_widget(Element::new("toggle").text("label", label), default)
    }

    fn flag_widget(&mut self, element: Element, default: bool) -> bool {
        let (widget, value) = self.widget(element.kind, default.into());
        let value = value.as_bool().unwrap_or(default);
        self.show(Element { widget, ..element.flag("value", value) });
        value
    }

    /// Returns the chosen option, initially the first one.
    pub fn radio(&mut self, label: &str, options: &[&str]) -> String {
        let element = Element::new("radio").text("label", label).json("options", options);
        self.choice_widget(element, options.iter().map(|option| (*option).to_string()).collect())
    }

    /// Takes options as pairs of value and label, and returns the chosen value.
    pub fn selectbox(&mut self, label: &str, options: &[(&str, &str)]) -> String {
        let choices: Vec<Choice<'_>> = options.iter().map(|&(value, label)| Choice { value, label }).collect();
        let element = Element::new("selectbox").text("label", label).json("options", choices);
        self.choice_widget(element, options.iter().map(|(value, _)| (*value).to_string()).collect())
    }

    fn choice_widget(&mut self, element: Element, options: Vec<String>) -> String {
        let first = options.first().cloned().unwrap_or_default();
        let (widget, value) = self.widget(element.kind, first.clone().into());
        // The chosen option may no longer exist.
        let value = options
            .into_iter()
            .find(|option| value == option.as_str())
            .unwrap_or(first);
        self.show(Element { widget, ..element.text("value", &value) });
        value
    }

    /// Returns a widget's name and its current value.
    fn widget(&mut self, kind: &'static str, default: Json) -> (String, Json) {
        let key = self.widget_key(kind);
        let value = self.memory.widgets.get(&key).cloned().unwrap_or(default);
        (key, value)
    }

    fn widget_key(&mut self, kind: &'static str) -> String {
        let place = self.place(kind);
        format!("{}/{place}", self.scope)
    }

    // Elements bound to a channel. They update without a run.

    /// A button that opens the dialog for a new room, whose address will be `href` followed by its id.
    pub fn new_room(&mut self, href: &str) {
        self.show(Element::new("new_room").text("href", href));
    }

    /// A room: its messages, the people in it, and a field for a new message.
    ///
    /// With `manages` the user may delete the room and stop any answer in it; with `operates`, ask again for any.
    pub fn chat(&mut self, room: &str, title: &str, assistant: &str, manages: bool, operates: bool) {
        let element = Element::new("chat")
            .text("room", room)
            .text("channel", channels::of_room(room));
        let me = self.visit.user.clone();
        let element = element.text("title", title).text("me", me).text("assistant", assistant);
        self.show(element.flag("manages", manages).flag("operates", operates));
    }

    /// A line for each series, over the last `window` seconds.
    pub fn live_line_chart(&mut self, channel: &str, title: &str, unit: &str, series: &[Series], window: u32) {
        let element = Element::new("live_line_chart")
            .text("channel", channel)
            .text("title", title)
            .text("unit", unit);
        self.show(element.json("series", series).number("window", f64::from(window)));
    }

    /// A line for each name in the object at `path`, over the last `window` seconds.
    pub fn live_breakdown(&mut self, channel: &str, title: &str, path: &str, rate: bool, window: u32) {
        let element = Element::new("live_breakdown")
            .text("channel", channel)
            .text("title", title)
            .text("path", path);
        self.show(element.flag("rate", rate).number("window", f64::from(window)));
    }

    pub fn live_metric(&mut self, channel: &str, unit: &str, series: Series, digits: u8) {
        let element = Element::new("live_metric")
            .text("channel", channel)
            .text("label", series.label)
            .text("unit", unit);
        let element = element.text("path", series.path).flag("rate", series.rate);
        self.show(element.number("digits", f64::from(digits)));
    }

    /// A table of the records at `path`. Shows `empty` when there are none.
    pub fn live_table(&mut self, channel: &str, path: &str, columns: &[Column], empty: &str) {
        let element = Element::new("live_table").text("channel", channel).text("path", path);
        self.show(element.json("columns", columns).text("empty", empty));
    }
}
