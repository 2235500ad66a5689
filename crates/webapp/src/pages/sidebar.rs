//! The sidebar of every page: the rooms and the console.

use crate::app::Ui;
use crate::chat::Rooms;

/// The address of a room's page.
pub fn room_href(room: &str) -> String {
    format!("/rooms/{room}")
}

pub fn sidebar(ui: &mut Ui<'_>) {
    let rooms = ui.data::<Rooms>();
    ui.sidebar(|ui| {
        ui.row(|ui| {
            ui.heading(4, "Rooms");
            ui.new_room(&room_href(""));
        });
        for room in rooms.all() {
            ui.key(&room.id).link(&room_href(&room.id), &format!("#{}", room.name));
        }

        ui.heading(4, "Operations");
        ui.link("/console", "Console");
    });
}
