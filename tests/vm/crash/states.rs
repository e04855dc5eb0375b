//! Which contents the disks may have had after a crash, and giving these to them.
//!
//! A disk has everything that was written before its last flush. Of later writes,
//! it may have none, all, or any sectors: a drive writes its cache in an order of
//! its own, and only a part of a longer write.

use super::disks::{Content, Event, Shared};
use crate::model::History;
use crate::support::fuse::DISKS;
use crate::support::random::Random;

/// The unit that a disk writes completely or not at all: the physical sector of present
/// disks. With smaller ones, ext4 itself refuses to mount after a block of metadata was
/// torn.
const SECTOR: usize = 4096;

/// How much a disk has kept of what it was not asked to flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Nothing,
    All,
    /// A choice by this seed.
    Some(u64),
}

/// A crash before the event at `position`.
#[derive(Clone, Copy, Debug)]
pub struct State {
    pub position: usize,
    pub kept: [Kept; DISKS],
}

impl std::fmt::Display for State {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [image, writable] = self.kept;
        write!(
            to,
            "position {}, image disk {image:?}, writable disk {writable:?}",
            self.position
        )
    }
}

/// For each flush, the states around it: what was flushed, and of the other disk's
/// unflushed writes none or all; and the other disk ahead of what was about to be
/// flushed. Then states in between, up to `count` in all, but at least a fifth of
/// that.
pub fn choose(events: &[Event], count: usize, random: &mut Random) -> Vec<State> {
    let mut states = Vec::new();
    let mut has_pending = [false; DISKS];
    for (position, event) in events.iter().enumerate() {
        let mut add = |image, writable| {
            states.push(State {
                position,
                kept: [image, writable],
            });
        };
        match event {
            Event::Write { disk, .. } => has_pending[*disk] = true,
            Event::Flush { disk } => {
                // Everything that the flush before has made durable, and everything
                // that was answered since.
                add(Kept::Nothing, Kept::Nothing);
                if has_pending[1 - disk] {
                    match disk {
                        0 => add(Kept::Nothing, Kept::All),
                        _ => add(Kept::All, Kept::Nothing),
                    }
                    if has_pending[*disk] {
                        add(Kept::All, Kept::All);
                    }
                }
                has_pending[*disk] = false;
            }
            Event::Mark(_) => {}
        }
    }
    for _ in 0..count.saturating_sub(states.len()).max(count / 5) {
        let mut kept = || match random.below(4) {
            0 => Kept::Nothing,
            1 => Kept::All,
            _ => Kept::Some(random.number()),
        };
        let kept = [kept(), kept()];
        let position = random.index(events.len());
        states.push(State { position, kept });
    }
    states.sort_by_key(|state| state.position);
    states
}

/// Goes through the record, from one state to a later one.
pub struct Replay {
    events: Vec<Event>,
    position: usize,
    /// The writes after each disk's last flush.
    pending: [Vec<usize>; DISKS],
    content: Shared,
    /// The requests and answers so far.
    pub history: History,
}

impl Replay {
    pub fn new(events: Vec<Event>, content: Shared) -> Replay {
        Replay {
            events,
            position: 0,
            pending: Default::default(),
            content,
            history: History::default(),
        }
    }

    /// Gives the disks the contents of a state.
    pub fn show(&mut self, state: &State) {
        let shared = self.content.clone();
        let mut content = shared.lock();
        content.revert();
        while self.position < state.position {
            match &self.events[self.position] {
                Event::Write { disk, .. } => self.pending[*disk].push(self.position),
                Event::Flush { disk } => {
                    for at in std::mem::take(&mut self.pending[*disk]) {
                        let (offset, bytes) = self.written(at);
                        content.write_for_good(*disk, offset, bytes);
                    }
                }
                Event::Mark(record) => self.history.take(record.clone()),
            }
            self.position += 1;
        }
        for (disk, kept) in state.kept.iter().enumerate() {
            self.write_pending(disk, *kept, &mut content);
        }
    }

    fn write_pending(&self, disk: usize, kept: Kept, content: &mut Content) {
        let mut random = match kept {
            Kept::Nothing => return,
            Kept::All => None,
            Kept::Some(seed) => Some(Random::new(seed)),
        };
        for at in &self.pending[disk] {
            let (offset, bytes) = self.written(*at);
            match &mut random {
                None => content.write(disk, offset, bytes),
                // The write is there completely, not at all, or torn.
                Some(random) => match random.below(5) {
                    0 | 1 => content.write(disk, offset, bytes),
                    2 | 3 => {}
                    _ => {
                        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                            if random.is_one_in(2) {
                                content.write(disk, offset + number * SECTOR, sector);
                            }
                        }
                    }
                },
            }
        }
    }

    fn written(&self, at: usize) -> (usize, &[u8]) {
        match &self.events[at] {
            Event::Write { offset, bytes, .. } => (*offset, bytes),
            _ => unreachable!("only writes are pending"),
        }
    }
}
