//! The product's own apps: the chat and the console.

mod chat;
mod console;

use crate::app::{App, PageError, Ui};
use crate::chat::Rooms;
use std::sync::Arc;

pub fn app(rooms: Arc<Rooms>) -> App {
    App::new()
        .data(rooms)
        .page("/", chat::page)
        .page("/rooms/{room}", chat::page)
        .page("/console", console::page)
        .fallback(nothing_here)
}

fn nothing_here(ui: &mut Ui<'_>) -> Result<(), PageError> {
    ui.page("Not found", |ui| {
        sidebar(ui);
        ui.main(|ui| {
            ui.heading(1, "Not found");
            ui.empty("There is nothing here", "The link may be old, or mistyped.");
            ui.link("/", "To the start");
        });
    });
    Ok(())
}

/// What every page has at its side.
fn sidebar(ui: &mut Ui<'_>) {
    let rooms = ui.data::<Rooms>();
    ui.sidebar(|ui| {
        ui.row(|ui| {
            ui.heading(4, "Rooms");
            ui.new_room(&chat::href(""));
        });
        for room in rooms.all() {
            ui.key(&room.id).link(&chat::href(&room.id), &format!("#{}", room.name));
        }
        ui.heading(4, "Operations");
        ui.link("/console", "Console");
    });
}
