//! The product's own apps: the chat and the console.

mod chat;
mod console;

use crate::app::{App, Ui};
use crate::chat::Rooms;
use std::sync::Arc;

pub fn app(rooms: Arc<Rooms>) -> App {
    App::new().data(rooms).page("/", chat::page).page("/rooms/{room}", chat::page).page("/console", console::page)
}

/// What every page has at its side.
fn sidebar(ui: &mut Ui<'_>) {
    let rooms = ui.data::<Rooms>();
    ui.sidebar(|ui| {
        ui.heading(4, "Rooms");
        for room in rooms.all() {
            ui.key(&room.id).link(&chat::href(&room.id), &format!("#{}", room.name));
        }
        ui.heading(4, "Operations");
        ui.link("/console", "Console");
    });
}
