//! The pages of the product's own apps, the chat and the console.

mod chat;
mod console;
mod sidebar;

use crate::app::{App, PageError, Ui};
use crate::chat::Rooms;
use std::sync::Arc;

pub fn app(rooms: Arc<Rooms>) -> App {
    App::new()
        .data(rooms)
        .page("/", chat::page)
        .page("/rooms/{room}", chat::page)
        .page("/console", console::page)
        .fallback(not_found)
}

fn not_found(ui: &mut Ui<'_>) -> Result<(), PageError> {
    ui.page("Not found", |ui| {
        sidebar::sidebar(ui);
        ui.main(|ui| {
            ui.heading(1, "Not found");
            ui.empty("There is nothing here", "The link may be old, or mistyped.");
            ui.link("/", "To the start");
        });
    });
    Ok(())
}
