//! A room, bound straight to its channel.

use super::sidebar;
use crate::app::{PageError, Ui};
use crate::chat::{ASSISTANT, Rooms};

pub fn href(room: &str) -> String {
    format!("/rooms/{room}")
}

pub fn page(ui: &mut Ui<'_>) -> Result<(), PageError> {
    let rooms = ui.data::<Rooms>();
    let Some(wanted) = ui.param("room") else {
        if let Some(first) = rooms.all().first() {
            ui.navigate(href(&first.id));
        }
        return Ok(());
    };
    let room = rooms.get(wanted);
    let gone = room.is_none() && rooms.is_gone(wanted);
    let missing = if gone { "Deleted" } else { "Not found" };
    let title = room.as_ref().map_or(missing.into(), |room| format!("#{}", room.name));
    ui.page(&title, |ui| {
        sidebar(ui);
        ui.main(|ui| match room {
            Some(room) => {
                let (manages, operates) = (rooms.manages(ui.user(), &room.id), rooms.is_operator(ui.user()));
                ui.key(&room.id)
                    .chat(&room.id, &room.name, ASSISTANT, manages, operates);
            }
            None if gone => {
                ui.heading(1, "Deleted");
                ui.empty("This room was deleted", "Its messages are gone. Choose another room from the list.");
                ui.link("/", "To the start");
            }
            None => {
                ui.heading(1, "Not found");
                ui.empty("There is no such room", "Choose one from the list, or make it with the + beside “Rooms”.");
                ui.link("/", "To the start");
            }
        });
    });
    Ok(())
}
