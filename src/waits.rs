//! Tracks what each request waits for, and refuses a request if too many others wait for the
//! same disk.
//!
//! Owns: which requests are at which *place*, which is a volume or the database, and since
//! when. Before a request may have to wait for the disk of a place, it notes that it is at this
//! place. If the disk does not answer, all requests at the place keep their threads for ever,
//! so they must not become many: requests for the other places need threads as well. Threads
//! that run no request, and requests that may take long by themselves, are not counted.
//!
//! A request is only refused at a place that it needs ([`enter`]). Where a request merely looks
//! whether a volume is there ([`note`]), a volume that does not answer counts as absent.

use std::cell::RefCell;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::types::Volume;
use crate::util::lock::lock;

/// What a request may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// The disk of a volume.
    Volume(Volume),
    /// The database's disk.
    Database,
}

/// If this many requests have been at a place, each for longer than [`LONG`], the place is
/// known not to answer.
const CROWD: usize = 16;
const LONG: Duration = Duration::from_secs(20);

/// How many requests may be at one place. Further requests wait until one of them leaves.
pub const MOST_AT_ONE_PLACE: usize = 64;

/// The number of places: the two volumes and the database.
pub const PLACES: usize = 3;

/// The requests at each place.
#[derive(Default)]
pub struct Waits {
    places: [Mutex<AtPlace>; PLACES],
    /// Signalled when a request leaves a place while others wait to enter. The order is that of
    /// `places`.
    left: [Condvar; PLACES],
}

#[derive(Default)]
struct AtPlace {
    /// When each request has entered.
    since: Vec<Instant>,
    /// How many requests wait to enter.
    outside: usize,
}

/// The request that a thread runs.
struct Request {
    waits: Arc<Waits>,
    /// The place where the request is, and since when.
    at: Option<(Awaited, Instant)>,
    /// The places where the request has been. It is not refused there again, because it may
    /// have to undo something.
    has_been: [bool; PLACES],
}

thread_local! {
    static REQUEST: RefCell<Option<Request>> = const { RefCell::new(None) };
}

/// Notes that this thread's request is about to use a place, for whose disk it may have to
/// wait.
///
/// # Errors
///
/// [`ErrorKind::Unavailable`] if many other requests have waited for this place for long,
/// unless this request has used the place before.
pub fn enter(place: Awaited) -> Result<()> {
    REQUEST.with_borrow_mut(|request| match request {
        Some(request) => {
            if !request.has_been[place.index()] {
                request.leave();
                request.waits.admit(place)?;
            }
            request.go_to(place);
            Ok(())
        }
        None => Ok(()),
    })
}

/// Notes that this thread's request is about to use a place. Unlike [`enter`], never refuses
/// the request.
pub fn note(place: Awaited) {
    REQUEST.with_borrow_mut(|request| {
        if let Some(request) = request {
            request.go_to(place);
        }
    });
}

impl Waits {
    /// Runs a request on this thread, and counts it at each place while it uses the place.
    pub fn run(self: &Arc<Waits>, request: impl FnOnce()) {
        /// Ends the request also after a panic.
        struct Ending;
        impl Drop for Ending {
            fn drop(&mut self) {
                REQUEST.take();
            }
        }
        REQUEST.set(Some(Request {
            waits: Arc::clone(self),
            at: None,
            has_been: [false; PLACES],
        }));
        let _ending = Ending;
        request();
    }

    /// Waits until a place has room for a request.
    fn admit(&self, place: Awaited) -> Result<()> {
        let left = &self.left[place.index()];
        let mut at = lock(&self.places[place.index()]);
        while at.since.len() >= CROWD {
            let mut waiting = at.since.iter().map(Instant::elapsed);
            let oldest = waiting.clone().max().unwrap_or_default();
            let long = waiting.by_ref().filter(|waited| *waited >= LONG).count();
            if long >= CROWD {
                return Err(place.does_not_answer(long, oldest));
            }
            if at.since.len() < MOST_AT_ONE_PLACE {
                break;
            }
            at.outside += 1;
            let pause = Duration::from_millis(100);
            let waited = left.wait_timeout(at, pause);
            at = waited.unwrap_or_else(PoisonError::into_inner).0;
            at.outside -= 1;
        }
        Ok(())
    }

    fn add(&self, place: Awaited) -> Instant {
        let now = Instant::now();
        lock(&self.places[place.index()]).since.push(now);
        now
    }

    fn remove(&self, place: Awaited, since: Instant) {
        let mut at = lock(&self.places[place.index()]);
        if let Some(found) = at.since.iter().position(|other| *other == since) {
            at.since.swap_remove(found);
        }
        // Each wake-up is a system call.
        if at.outside > 0 {
            self.left[place.index()].notify_one();
        }
    }
}

impl Request {
    fn go_to(&mut self, place: Awaited) {
        if self.at.is_some_and(|(at, _)| at == place) {
            return;
        }
        self.leave();
        self.at = Some((place, self.waits.add(place)));
        self.has_been[place.index()] = true;
    }

    fn leave(&mut self) {
        if let Some((place, since)) = self.at.take() {
            self.waits.remove(place, since);
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Awaited {
    fn index(self) -> usize {
        match self {
            Awaited::Volume(volume) => volume as usize,
            Awaited::Database => 2,
        }
    }

    fn does_not_answer(self, waiting: usize, longest: Duration) -> Error {
        let name = match self {
            Awaited::Volume(volume) => format!("the {volume} volume"),
            Awaited::Database => "the database".to_owned(),
        };
        Error::new(
            ErrorKind::Unavailable,
            format!(
                "{name} does not answer: {waiting} requests wait for it, the first for {} \
                 seconds. Check its disk, and try again when the disk answers",
                longest.as_secs()
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread::{scope, sleep};

    use super::*;

    const IMAGE: Awaited = Awaited::Volume(Volume::Image);
    const WRITABLE: Awaited = Awaited::Volume(Volume::Writable);

    fn tried(waits: &Arc<Waits>, places: &[Awaited]) -> Vec<Option<ErrorKind>> {
        let mut results = Vec::new();
        waits.run(|| {
            let kinds = places.iter().map(|place| enter(*place).err());
            results.extend(kinds.map(|error| error.map(|error| error.kind())));
        });
        results
    }

    #[test]
    fn only_the_place_that_does_not_answer_is_refused_and_only_at_first() {
        const UNAVAILABLE: Option<ErrorKind> = Some(ErrorKind::Unavailable);
        let waits = &Arc::<Waits>::default();
        scope(|scope| {
            let (entered, entries) = channel();
            let mut stuck = Vec::new();
            // One request undoes something at the place to which it comes back.
            let (undo, undoing) = channel::<()>();
            scope.spawn(move || {
                waits.run(|| {
                    enter(WRITABLE).unwrap();
                    enter(Awaited::Database).unwrap();
                    undoing.recv().unwrap_err();
                    enter(WRITABLE).unwrap();
                });
            });
            for _ in 0..MOST_AT_ONE_PLACE {
                let (release, wait) = channel::<()>();
                let entered = entered.clone();
                stuck.push(release);
                scope.spawn(move || {
                    waits.run(|| {
                        enter(WRITABLE).unwrap();
                        entered.send(()).unwrap();
                        wait.recv().unwrap_err();
                    });
                });
            }
            for _ in 0..MOST_AT_ONE_PLACE {
                entries.recv_timeout(Duration::from_secs(60)).unwrap();
            }
            // A request that cannot enter waits until the others have been there for long.
            let begun = Instant::now();
            assert_eq!(tried(waits, &[WRITABLE]), [UNAVAILABLE]);
            assert!(begun.elapsed() > LONG / 2, "{begun:?}");
            let begun = Instant::now();
            let all = [IMAGE, WRITABLE, IMAGE, Awaited::Database];
            assert_eq!(tried(waits, &all), [None, UNAVAILABLE, None, None]);
            assert!(begun.elapsed() < LONG / 2, "{begun:?}");
            drop(undo);
            drop(stuck);
            while tried(waits, &[WRITABLE]) != [None] {
                sleep(Duration::from_millis(10));
            }
        });
    }

    #[test]
    fn threads_without_a_request_are_never_refused() {
        for _ in 0..2 * MOST_AT_ONE_PLACE {
            enter(IMAGE).unwrap();
        }
    }
}
