//! Whether the writable volume is still the same as when it was confirmed.
//!
//! Two signs show that it may not be: its mark or its record of ids is another file, or its
//! file system was unmounted in between. After an unmount the same disk may be back in an
//! earlier state, with the same files. The kernel reports the unmount through an inotify
//! watch on the mark (inotify(7), `IN_UNMOUNT`). A watch does not keep the file system
//! mounted.

use std::sync::Mutex;

use rustix::fd::OwnedFd;
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::io::read;

use super::identity::Seen;
use super::paths::MARK;
use crate::util::lock::lock;

/// The size of the buffer for events. It has room for many: an event without a name takes
/// 16 bytes.
const EVENTS_BYTES: usize = 1024;

pub(super) struct Presence {
    state: Mutex<State>,
    /// The inotify descriptor; `None` if the system's limit is reached: then only the files
    /// are compared.
    events: Option<OwnedFd>,
}

#[derive(Default)]
struct State {
    confirmed: Option<Seen>,
    /// The number of times that the kernel has reported an unmount, or a removed mark.
    departures: u64,
}

/// A confirmation of the volume that has begun, see [`Presence::look`].
#[derive(Clone, Copy)]
pub(super) struct Look {
    departures: u64,
}

impl Presence {
    pub(super) fn new() -> Presence {
        Presence {
            state: Mutex::default(),
            events: init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok(),
        }
    }

    /// Whether the volume that is seen now is the confirmed one.
    pub(super) fn is_confirmed(&self, seen: Option<Seen>) -> bool {
        let mut state = lock(&self.state);
        self.take_events(&mut state);
        seen.is_some() && seen == state.confirmed
    }

    /// Begins to confirm the volume at `path`. The caller has to open the volume after this
    /// call.
    pub(super) fn look(&self, path: &str) -> Look {
        if let Some(events) = &self.events {
            let flags = WatchFlags::DELETE_SELF | WatchFlags::DONT_FOLLOW;
            // Without a mark, this call fails, and the volume will not be confirmed.
            let _ = add_watch(events, format!("{path}/{MARK}"), flags);
        }
        let mut state = lock(&self.state);
        self.take_events(&mut state);
        Look {
            departures: state.departures,
        }
    }

    /// Confirms a volume that was found to be the right one, unless it may have been unmounted
    /// since `look` began.
    pub(super) fn confirm(&self, look: Look, seen: Option<Seen>) {
        let mut state = lock(&self.state);
        self.take_events(&mut state);
        if state.departures == look.departures {
            state.confirmed = seen;
        }
    }

    /// Updates the metadata of the confirmed volume after this program has changed a file
    /// there.
    pub(super) fn change(&self, change: impl FnOnce(Seen) -> Seen) {
        let mut state = lock(&self.state);
        self.take_events(&mut state);
        state.confirmed = state.confirmed.map(change);
    }

    fn take_events(&self, state: &mut State) {
        let Some(events) = &self.events else {
            return;
        };
        let mut buffer = [0_u8; EVENTS_BYTES];
        while read(events, &mut buffer).is_ok_and(|length| length > 0) {
            state.departures += 1;
            state.confirmed = None;
        }
    }
}
