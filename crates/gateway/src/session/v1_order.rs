//! Keeps v1 replies in the order of their requests, which have no ids.

use super::held::Held;
use crate::reply::Reply;
use std::collections::BTreeMap;

#[derive(Default)]
pub struct V1Order {
    /// The place of the next request.
    next: u64,
    /// The place of the next reply to leave.
    head: u64,
    /// Replies that wait for those before them.
    waiting: BTreeMap<u64, Held>,
}

impl V1Order {
    /// Whether all replies have left.
    pub fn is_empty(&self) -> bool {
        self.next == self.head
    }

    /// Replies that have not left.
    pub fn len(&self) -> usize {
        usize::try_from(self.next - self.head).expect("places are bounded")
    }

    /// Gives one more request its place, behind all others.
    pub fn join(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Whether all replies before this place have left.
    pub fn is_first(&self, place: u64) -> bool {
        place == self.head
    }

    pub fn insert(&mut self, place: u64, reply: impl Into<Held>) {
        self.waiting.insert(place, reply.into());
    }

    /// Fills the places that have no reply yet.
    pub fn insert_missing(&mut self, reply: impl Fn() -> Reply) {
        for place in self.head..self.next {
            self.waiting.entry(place).or_insert_with(|| reply().into());
        }
    }

    /// Removes the first reply, if it is there.
    pub fn pop(&mut self) -> Option<Reply> {
        if self.waiting.is_empty() {
            return None;
        }
        let held = self.waiting.remove(&self.head)?;
        self.head += 1;
        Some(held.reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn reply(text: &'static str) -> Reply {
        Reply::ok(text.as_bytes())
    }

    fn left(order: &mut V1Order) -> Vec<Bytes> {
        std::iter::from_fn(|| order.pop()).map(|reply| reply.payload).collect()
    }

    #[test]
    fn replies_leave_in_the_order_of_their_requests() {
        let mut order = V1Order::default();
        let [first, second, third] = [order.join(), order.join(), order.join()];
        order.insert(third, reply("3"));
        order.insert(second, reply("2"));
        assert_eq!((order.pop(), order.len()), (None, 3));

        order.insert(first, reply("1"));
        assert_eq!(left(&mut order), ["1", "2", "3"]);
        assert!(order.is_empty());
    }

    #[test]
    fn missing_replies_are_filled_in() {
        let mut order = V1Order::default();
        let [_, second, _] = [order.join(), order.join(), order.join()];
        order.insert(second, reply("2"));
        order.insert_missing(|| reply("closed"));
        assert_eq!(left(&mut order), ["closed", "2", "closed"]);
    }
}
