//! How many bytes and inodes snapshots take.
//!
//! A kubelet asks containerd for the usage of every container all the time. With a project
//! quota, the file system knows the usage. Without one, the files are counted in a walk,
//! and simultaneous requests for one snapshot share the walk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;

use super::Snapshotter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::Snapshot;
use crate::tree;
use crate::types::{Kind, Quoted, SnapshotId, Usage, Volume};
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::volume::Dirs;

/// A caller who waits for an answer, and may stop waiting.
#[derive(Clone, Debug, Default)]
pub struct Caller(Arc<AtomicBool>);

impl Caller {
    /// Notes that the caller does not wait any longer.
    pub fn leave(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn has_left(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often usages were returned since the start, by their source.
#[derive(Clone, Copy, Debug, Default)]
pub struct UsageFigures {
    pub by_quota: u64,
    pub by_walk: u64,
    /// Answers from a walk that another request had begun.
    pub by_shared_walk: u64,
    /// Answers from an earlier walk (`--usage-max-age`).
    pub by_earlier_walk: u64,
}

/// The walks under way, and the results of earlier ones.
#[derive(Default)]
pub(super) struct Walks(Mutex<Known>);

#[derive(Default)]
struct Known {
    running: HashMap<SnapshotId, Arc<Walk>>,
    found: HashMap<SnapshotId, Counted>,
    figures: UsageFigures,
}

#[derive(Clone, Copy)]
struct Counted {
    at: Instant,
    usage: Usage,
}

/// A walk that counts the files of one snapshot.
#[derive(Default)]
struct Walk(Monitor<Progress>);

#[derive(Default)]
struct Progress {
    callers: Vec<Caller>,
    /// The result of the walk, once there is one. An error is stored as its kind and text,
    /// and all callers get it.
    result: Option<std::result::Result<Usage, (ErrorKind, String)>>,
}

impl Progress {
    fn is_given_up(&self) -> bool {
        self.callers.iter().all(Caller::has_left)
    }
}

impl Walk {
    /// Joins the walk. Returns `false` if it has ended, or is about to end
    /// because all callers have left.
    fn join(&self, caller: &Caller) -> bool {
        self.0.look(|progress| {
            let can_join = progress.result.is_none() && !progress.is_given_up();
            if can_join {
                progress.callers.push(caller.clone());
            }
            can_join
        })
    }

    /// Waits for the result; `None` if the caller has left before.
    fn wait(&self, caller: &Caller) -> Option<Result<Usage>> {
        /// How often to look whether the caller has left.
        const LOOK: Duration = Duration::from_millis(50);
        while !caller.has_left() {
            let deadline = Some(Instant::now() + LOOK);
            let is_running = |progress: &Progress| progress.result.is_none();
            let result = |progress: &mut Progress| progress.result.clone();
            if let Some(result) = self.0.wait_until(deadline, is_running, result).flatten() {
                return Some(result.map_err(|(kind, text)| Error::new(kind, text)));
            }
        }
        None
    }
}

/// Ends a walk when dropped, even after a panic, because other callers wait for the walk.
struct Leader<'a> {
    walks: &'a Walks,
    id: SnapshotId,
    walk: Arc<Walk>,
}

impl Leader<'_> {
    fn end(&self, result: &Result<Usage>) {
        let answer = match result {
            Ok(usage) => Ok(*usage),
            Err(error) => Err((error.kind(), error.chain())),
        };
        let walk = &self.walk.0;
        walk.change(|progress| {
            progress.result.get_or_insert(answer);
        });
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let mut known = lock(&self.walks.0);
        let is_this = |walk: &Arc<Walk>| Arc::ptr_eq(walk, &self.walk);
        if known.running.get(&self.id).is_some_and(is_this) {
            known.running.remove(&self.id);
        }
        drop(known);
        self.end(&Err(Error::new(
            ErrorKind::Internal,
            "the count of the files has ended because of a bug; the log shows where",
        )));
    }
}

impl Walks {
    pub(super) fn figures(&self) -> UsageFigures {
        lock(&self.0).figures
    }

    /// Forgets the last count of a snapshot that was removed, or is a layer now.
    pub(super) fn forget(&self, id: SnapshotId) {
        lock(&self.0).found.remove(&id);
    }

    /// Returns a snapshot's usage: a result that is at most `max_age` old, the
    /// result of another walk that has begun, or the result of `walk`. The
    /// argument of `walk` returns `true` once all callers have left, and `walk`
    /// should then end.
    fn answer(
        &self,
        id: SnapshotId,
        max_age: Duration,
        caller: &Caller,
        walk: impl FnOnce(&dyn Fn() -> bool) -> Result<Usage>,
    ) -> Result<Usage> {
        let mut known = lock(&self.0);
        let earlier = known.found.get(&id).copied();
        if let Some(earlier) = earlier.filter(|found| found.at.elapsed() < max_age) {
            known.figures.by_earlier_walk += 1;
            return Ok(earlier.usage);
        }
        let running = known.running.get(&id).filter(|walk| walk.join(caller));
        if let Some(running) = running.map(Arc::clone) {
            known.figures.by_shared_walk += 1;
            drop(known);
            return running.wait(caller).unwrap_or_else(|| Err(left()));
        }
        let new = Arc::new(Walk::default());
        new.0.look(|progress| progress.callers.push(caller.clone()));
        known.running.insert(id, Arc::clone(&new));
        known.figures.by_walk += 1;
        drop(known);

        let leader = Leader {
            walks: self,
            id,
            walk: new,
        };
        // The age of the result counts from the beginning of the walk.
        let at = Instant::now();
        let result = walk(&|| leader.walk.0.look(|progress| progress.is_given_up()));
        if let Ok(usage) = result
            && !max_age.is_zero()
        {
            let found = &mut lock(&self.0).found;
            found.retain(|_, found| found.at.elapsed() < max_age);
            found.insert(id, Counted { at, usage });
        }
        leader.end(&result);
        result
    }
}

fn left() -> Error {
    Error::new(ErrorKind::Cancelled, "the caller does not wait any longer")
}

impl Snapshotter {
    /// The usage of a snapshot without its parents: for an active one, the present usage;
    /// for a layer, the usage recorded by Commit; for a view, nothing. The usage according
    /// to a project quota includes the directories of the snapshotter and of overlayfs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] if the writable volume is
    /// needed and missing; [`ErrorKind::Cancelled`] if `caller` has left.
    pub fn usage(&self, key: &str, caller: &Caller) -> Result<Usage> {
        let usage = || -> Result<Usage> {
            if caller.has_left() {
                return Err(left());
            }
            let snapshot = self.store.read()?.stat(key)?;
            match (snapshot.info.kind, snapshot.volume) {
                (Kind::Active, Some(volume)) => self.active_usage(key, &snapshot, volume, caller),
                _ => Ok(snapshot.usage),
            }
        };
        usage().context(|| format!("count the usage of snapshot {}", Quoted(key)))
    }

    fn active_usage(
        &self,
        key: &str,
        snapshot: &Snapshot,
        volume: Volume,
        caller: &Caller,
    ) -> Result<Usage> {
        let dirs = self.volumes.open(volume)?;
        let upper = self.open_upper(key, snapshot, &dirs)?;
        // While files are being charged to a project, the quota counts only a part of them.
        if volume == Volume::Writable
            && !self.projects.is_uncharged(snapshot.id)
            && let Some(usage) = self.projects.usage(&dirs, snapshot.id, &upper)?
        {
            lock(&self.walks.0).figures.by_quota += 1;
            return Ok(usage);
        }
        let max_age = self.options.quota.usage_max_age;
        self.walks
            .answer(snapshot.id, max_age, caller, |is_given_up| {
                Ok(tree::count_unless(upper, is_given_up)?.usage)
            })
    }

    /// Opens the upper directory of an active snapshot. If the snapshot was removed
    /// meanwhile, the error is [`ErrorKind::NotFound`] rather than lost data.
    pub(super) fn open_upper(
        &self,
        key: &str,
        snapshot: &Snapshot,
        dirs: &Dirs,
    ) -> Result<OwnedFd> {
        dirs.open_upper(snapshot.id).or_else(|error| {
            let now = self.store.read()?.stat(key)?;
            if now.id == snapshot.id {
                return Err(error);
            }
            Err(Error::new(
                ErrorKind::NotFound,
                format!("snapshot {} was removed meanwhile", Quoted(key)),
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const USAGE: Usage = Usage {
        size_bytes: 4096,
        inodes: 7,
    };

    fn until(mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < Duration::from_secs(30));
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn simultaneous_callers_share_one_walk() {
        let walks = Walks::default();
        let count = AtomicUsize::new(0);
        let ask = || {
            walks.answer(
                SnapshotId::new(1),
                Duration::ZERO,
                &Caller::default(),
                |_| {
                    count.fetch_add(1, Ordering::SeqCst);
                    // Wait until all others have joined.
                    until(|| walks.figures().by_shared_walk == 5);
                    Ok(USAGE)
                },
            )
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap().unwrap(), USAGE);
            }
        });
        assert_eq!(count.load(Ordering::SeqCst), 1);
        // A later request starts another walk, and so does a request for
        // another snapshot.
        walks
            .answer(
                SnapshotId::new(1),
                Duration::ZERO,
                &Caller::default(),
                |_| Ok(USAGE),
            )
            .unwrap();
        assert_eq!(walks.figures().by_walk, 2);
    }

    #[test]
    fn a_walk_goes_on_while_a_caller_is_left_and_then_ends() {
        let walks = Walks::default();
        let (first, second) = (Caller::default(), Caller::default());
        let (begin, begun) = channel();
        thread::scope(|scope| {
            let leader = scope.spawn(|| {
                let caller = &first;
                walks.answer(SnapshotId::new(1), Duration::ZERO, caller, |is_given_up| {
                    begin.send(()).unwrap();
                    until(is_given_up);
                    Err(left())
                })
            });
            begun.recv().unwrap();
            let follower = scope.spawn(|| {
                let never = |_: &dyn Fn() -> bool| panic!("it has to join");
                walks.answer(SnapshotId::new(1), Duration::ZERO, &second, never)
            });
            until(|| walks.figures().by_shared_walk == 1);
            first.leave();
            thread::sleep(Duration::from_millis(30));
            assert!(!leader.is_finished(), "a caller is left");
            second.leave();
            for thread in [leader, follower] {
                let error = thread.join().unwrap().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Cancelled);
            }
        });
        assert!(lock(&walks.0).running.is_empty());
    }

    #[test]
    fn no_caller_joins_a_walk_that_is_given_up() {
        let walks = Walks::default();
        let caller = Caller::default();
        walks
            .answer(SnapshotId::new(1), Duration::ZERO, &caller, |_| {
                caller.leave();
                // This request comes before the walk has noticed that its caller has left.
                let other = Caller::default();
                assert_eq!(
                    walks
                        .answer(SnapshotId::new(1), Duration::ZERO, &other, |_| Ok(USAGE))
                        .unwrap(),
                    USAGE
                );
                Err(left())
            })
            .unwrap_err();
    }

    #[test]
    fn a_result_is_used_again_until_it_is_too_old() {
        let walks = Walks::default();
        let ask = |max_age| {
            walks.answer(SnapshotId::new(1), max_age, &Caller::default(), |_| {
                Ok(USAGE)
            })
        };
        let long = Duration::from_secs(60);
        ask(long).unwrap();
        ask(long).unwrap();
        assert_eq!(walks.figures().by_walk, 1);
        ask(Duration::ZERO).unwrap();
        assert_eq!(walks.figures().by_walk, 2);
        walks.forget(SnapshotId::new(1));
        ask(long).unwrap();
        assert_eq!(walks.figures().by_walk, 3);

        let short = Duration::from_millis(5);
        thread::sleep(short);
        ask(short).unwrap();
        assert_eq!(walks.figures().by_walk, 4);
        // A result that is too old for every caller is not kept.
        thread::sleep(short);
        let other = SnapshotId::new(2);
        let caller = Caller::default();
        walks.answer(other, short, &caller, |_| Ok(USAGE)).unwrap();
        assert_eq!(lock(&walks.0).found.len(), 1);
    }

    #[test]
    fn an_error_reaches_all_and_is_not_kept() {
        let walks = Walks::default();
        let long = Duration::from_secs(60);
        let fail = || Err(Error::data_loss("gone"));
        thread::scope(|scope| {
            let leader = scope.spawn(|| {
                walks.answer(SnapshotId::new(1), long, &Caller::default(), |_| {
                    until(|| walks.figures().by_shared_walk == 1);
                    fail()
                })
            });
            until(|| walks.figures().by_walk == 1);
            let shared = walks.answer(SnapshotId::new(1), long, &Caller::default(), |_| Ok(USAGE));
            for result in [leader.join().unwrap(), shared] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::DataLoss);
            }
        });
        walks
            .answer(SnapshotId::new(1), long, &Caller::default(), |_| Ok(USAGE))
            .unwrap();
        assert_eq!(walks.figures().by_walk, 2);
    }
}
