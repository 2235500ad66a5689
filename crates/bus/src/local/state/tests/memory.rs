//! The memory that tasks cost, counted from the sizes of the collections that hold them. A task is a record, an
//! assignment, a result and a usage event, as routers and workers write them.

use super::*;

/// What is left of a task that has ended: its record, three message ids, its usage event.
const ENDED_BYTES_MAX: usize = 900;
/// What a task costs that waits for a worker: its record, its assignment, one message id.
const WAITING_BYTES_MAX: usize = 700;
/// Enough for the slack of growing collections to be typical.
const TASKS: u64 = 5000;
/// Memory of a message id, as its own test has it.
const ID_BYTES: usize = 100;
const SIZES: Caps = Caps { message_ids: 100_000, usage: 200_000, tasks: 300_000 };

struct Caps {
    message_ids: u64,
    usage: u64,
    tasks: u64,
}

/// The collections of a state, in bytes. A B-tree's node is at least half full; a hash table keeps a byte for each place.
fn bytes(state: &State) -> usize {
    fn tree<K, V>(len: usize) -> usize {
        2 * len * (size_of::<K>() + size_of::<V>())
    }
    let stream = |stream: &Stream| {
        let seen = stream.seen.from(0).count() * ID_BYTES;
        let out: usize = stream.consumers.values().map(|consumer| consumer.out().count()).sum();
        let outstanding = tree::<u64, (u32, u64)>(out) + tree::<(u64, u64), ()>(out);
        tree::<u64, StoredAt>(stream.messages.len()) + seen + outstanding
    };
    let bucket = |bucket: &Bucket| {
        let places = bucket.entries.capacity() * 8 / 7 * (size_of::<(Arc<str>, Entry)>() + 1);
        // A key is in one allocation with two counters.
        let keys: usize = bucket.entries.keys().map(|key| key.len() + 16).sum();
        places + keys + tree::<u64, Arc<str>>(bucket.order.len()) + tree::<u64, ()>(bucket.done.len())
    };
    let rows = tree::<u64, (u64, u64)>(state.rows.live.len()) + tree::<u64, ()>(state.rows.dead.len());
    state.streams.values().map(stream).sum::<usize>() + state.buckets.values().map(bucket).sum::<usize>() + rows
}

/// A state with the product's streams, and the tasks that it has seen.
struct Product {
    state: State,
    row: u64,
    tasks: u64,
}

impl Product {
    fn new(caps: &Caps) -> Self {
        let mut state = State::default();
        let mut group = Group::new(1);
        let stream = |name, retention| StreamConfig {
            dedup_bytes: caps.message_ids,
            ..StreamConfig::new(name, vec![format!("{name}.>")], retention)
        };
        state.declare_stream(&mut group, stream("ASSIGN", Retention::WorkQueue));
        let router = consumer("RESULT", "router", None);
        state.declare_stream(
            &mut group,
            StreamConfig { consumers: vec![router], ..stream("RESULT", Retention::Interest) },
        );
        let max_bytes = caps.usage;
        state.declare_stream(&mut group, StreamConfig { max_bytes, ..stream("USAGE", Retention::Limits) });
        let max_bytes = Some(caps.tasks);
        state.declare_bucket(&BucketConfig { name: "TASKS", max_age: None, max_bytes });
        state.consumer(&mut group, &consumer("ASSIGN", "worker", None)).unwrap();
        Self { state, row: 1, tasks: 0 }
    }

    fn write(&mut self, steps: &[Step]) {
        self.row += 1;
        let mut group = Group::new(self.row);
        self.state.write(&mut group, steps, 0, 0).unwrap();
        self.state.row_added(self.row, group.len() as u64);
    }

    fn claim(&mut self, stream: &'static str, name: &str) -> Step {
        let config = consumer(stream, name, None);
        let mut group = Group::new(self.row);
        let (claimed, _) = self.state.claim(&mut group, &config, 1, 0).unwrap();
        Step::Ack { consumer: config.into(), sequence: claimed[0].sequence }
    }

    /// The values of a task of 256 bytes. They are in the log, not in memory.
    fn append(stream: &'static str, task: u64) -> Step {
        let message = Message {
            subject: format!("{stream}.v1").into(),
            payload: vec![b'x'; 600].into(),
            ..Message::default()
        };
        Step::Append {
            stream,
            message: NewMessage::new(&message, Some(&format!("{stream}-{task}"))),
        }
    }

    fn record(task: u64, done: bool) -> Step {
        // A tenant and a UUID.
        let key = format!("default/{task:036}");
        Step::Put(Put {
            bucket: "TASKS".into(),
            key,
            value: vec![b'x'; 900].into(),
            expected: None,
            done: Some(done),
        })
    }

    fn push(&mut self) {
        self.tasks += 1;
        self.write(&[Self::record(self.tasks, false), Self::append("ASSIGN", self.tasks)]);
    }

    /// Ends the oldest task.
    fn end(&mut self, task: u64) {
        let assignment = self.claim("ASSIGN", "worker");
        self.write(&[Self::append("RESULT", task), assignment]);
        let result = self.claim("RESULT", "router");
        self.write(&[Self::append("USAGE", task), Self::record(task, true), result]);
    }

    /// What the engine does beside the operations, with a snapshot that covers all rows.
    fn maintain(&mut self) {
        while self.state.prune(&mut Group::new(self.row), 0) {}
        self.state.take_dead_rows(self.row, usize::MAX);
    }

    fn run(&mut self, tasks: u64) {
        for _ in 0..tasks {
            self.push();
            self.end(self.tasks);
        }
        self.maintain();
    }
}

const UNLIMITED: Caps = Caps { message_ids: u64::MAX, usage: u64::MAX / 4, tasks: u64::MAX / 4 };

#[test]
fn task_costs_few_bytes_of_memory() {
    let mut product = Product::new(&UNLIMITED);
    let empty = bytes(&product.state);
    product.run(TASKS);
    let ended = (bytes(&product.state) - empty) / TASKS as usize;
    println!("{ended} bytes for each task that has ended");
    assert!(ended <= ENDED_BYTES_MAX, "{ended}");

    let mut product = Product::new(&UNLIMITED);
    (0..TASKS).for_each(|_| product.push());
    let waiting = (bytes(&product.state) - empty) / TASKS as usize;
    println!("{waiting} bytes for each task that waits");
    assert!(waiting <= WAITING_BYTES_MAX, "{waiting}");
}

#[test]
fn memory_is_bounded_however_many_tasks_have_ended() {
    let mut product = Product::new(&SIZES);
    product.run(2_000);
    let full = bytes(&product.state);
    for _ in 0..5 {
        product.run(2_000);
    }
    let after = bytes(&product.state);
    assert!(after <= full + full / 4, "{full} bytes after 2,000 tasks, {after} after 12,000");

    // The ids of three streams, and what else the sizes allow.
    let ids = 3 * SIZES.message_ids as usize;
    assert!(after <= ids + (SIZES.usage + SIZES.tasks) as usize, "{after}");
}
