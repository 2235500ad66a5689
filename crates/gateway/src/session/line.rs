//! The answers to v1 requests, which have no id: they leave in the order of their requests.

use super::held::Held;
use crate::forward::Reply;
use std::collections::BTreeMap;

#[derive(Default)]
pub struct Line {
    /// The next place to be given, and the next to be answered.
    next: u64,
    head: u64,
    /// Answers that wait for those before them.
    waiting: BTreeMap<u64, Held>,
}

impl Line {
    /// Everything that stood in it has left.
    pub fn is_empty(&self) -> bool {
        self.next == self.head
    }

    pub fn len(&self) -> usize {
        usize::try_from(self.next - self.head).expect("places are bounded")
    }

    /// The place of one more request, behind all others.
    pub fn join(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Everything before this place has left.
    pub fn is_first(&self, place: u64) -> bool {
        place == self.head
    }

    pub fn answer(&mut self, place: u64, reply: impl Into<Held>) {
        self.waiting.insert(place, reply.into());
    }

    /// Answers whoever has no answer yet.
    pub fn answer_all(&mut self, reply: impl Fn() -> Reply) {
        for place in self.head..self.next {
            self.waiting.entry(place).or_insert_with(|| reply().into());
        }
    }

    /// The first answer in the line, once it is there.
    pub fn leave(&mut self) -> Option<Reply> {
        let held = self.waiting.remove(&self.head)?;
        self.head += 1;
        Some(held.reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use wire::ipc::FrameType;

    fn reply(text: &'static str) -> Reply {
        (FrameType::ResponseOk, Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn answers_leave_in_the_order_of_their_requests() {
        let mut line = Line::default();
        let [first, second, third] = [line.join(), line.join(), line.join()];
        line.answer(third, reply("3"));
        line.answer(second, reply("2"));
        assert_eq!((line.leave(), line.len()), (None, 3));
        line.answer(first, reply("1"));
        let left: Vec<Bytes> = std::iter::from_fn(|| line.leave())
            .map(|(_, payload)| payload)
            .collect();
        assert_eq!(left, ["1", "2", "3"]);
        assert!(line.is_empty());
    }

    #[test]
    fn whoever_has_no_answer_gets_the_last() {
        let mut line = Line::default();
        let [_, second, _] = [line.join(), line.join(), line.join()];
        line.answer(second, reply("2"));
        line.answer_all(|| reply("closed"));
        let left: Vec<Bytes> = std::iter::from_fn(|| line.leave())
            .map(|(_, payload)| payload)
            .collect();
        assert_eq!(left, ["closed", "2", "closed"]);
    }
}
