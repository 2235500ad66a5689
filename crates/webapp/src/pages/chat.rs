//! The page of a room. The chat element subscribes to the room's channel itself, so messages need no run.

use super::sidebar::{room_href, sidebar};
use crate::accounts::ASSISTANT;
use crate::app::{PageError, Ui};
use crate::chat::Rooms;

pub fn page(ui: &mut Ui<'_>) -> Result<(), PageError> {
    let rooms = ui.data::<Rooms>();
    let Some(wanted) = ui.param("room") else {
        if let Some(first) = rooms.all().first() {
            ui.navigate(room_href(&first.id));
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
                let hint = "Choose one from the list, or create one with the + beside “Rooms”.";
                ui.empty("There is no such room", hint);
                ui.link("/", "To the start");
            }
        });
    });
    Ok(())
}
