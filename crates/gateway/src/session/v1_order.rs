//! Sends v1 replies in the order of their requests, because v1 requests have no ids.

use super::held::Held;
use crate::reply::Reply;
use std::collections::BTreeMap;

#[derive(Default)]
pub struct V1Order {
    /// The position of the next request.
    next: u64,
    /// The position of the next reply to send.
    head: u64,
    /// Replies that wait for those before them.
    waiting: BTreeMap<u64, Held>,
}

impl V1Order {
    /// Whether all replies have been removed.
    pub fn is_empty(&self) -> bool {
        self.next == self.head
    }

    /// The number of replies that have not been removed.
    pub fn len(&self) -> usize {
        usize::try_from(self.next - self.head).expect("the number of waiting replies is bounded")
    }

    /// Assigns the next position to a request.
    pub fn join(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Whether the reply at this position is the next to send.
    pub fn is_first(&self, position: u64) -> bool {
        position == self.head
    }

    /// Adds the reply to the request at this position.
    pub fn insert(&mut self, position: u64, reply: impl Into<Held>) {
        self.waiting.insert(position, reply.into());
    }

    /// Adds a reply at each position that has none yet.
    pub fn insert_missing(&mut self, reply: impl Fn() -> Reply) {
        for position in self.head..self.next {
            self.waiting.entry(position).or_insert_with(|| reply().into());
        }
    }

    /// Removes the next reply to send, if it has arrived.
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

    fn pop_all(order: &mut V1Order) -> Vec<Bytes> {
        std::iter::from_fn(|| order.pop()).map(|reply| reply.payload).collect()
    }

    #[test]
    fn replies_are_sent_in_the_order_of_their_requests() {
        let mut order = V1Order::default();
        let [first, second, third] = [order.join(), order.join(), order.join()];
        order.insert(third, reply("3"));
        order.insert(second, reply("2"));
        assert_eq!((order.pop(), order.len()), (None, 3));

        order.insert(first, reply("1"));
        assert_eq!(pop_all(&mut order), ["1", "2", "3"]);
        assert!(order.is_empty());
    }

    #[test]
    fn missing_replies_are_filled_in() {
        let mut order = V1Order::default();
        let [_, second, _] = [order.join(), order.join(), order.join()];
        order.insert(second, reply("2"));
        order.insert_missing(|| reply("closed"));
        assert_eq!(pop_all(&mut order), ["closed", "2", "closed"]);
    }
}
