//! What snapshots take.
//!
//! A kubelet has containerd ask for every container's usage, over and over. With
//! a project quota the file system has the figure; else the files are walked, and
//! then all who ask for one snapshot at the same time wait for one walk.

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

/// Somebody who waits for an answer, and may cease to.
#[derive(Clone, Debug, Default)]
pub struct Caller(Arc<AtomicBool>);

impl Caller {
    /// Does not wait any longer.
    pub fn leave(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn has_left(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How usages have been told, since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct UsageFigures {
    pub by_quota: u64,
    pub by_walk: u64,
    /// By the walk that another request had begun.
    pub by_shared_walk: u64,
    /// By a walk that was over, `--usage-max-age`.
    pub by_earlier_walk: u64,
}

/// The walks under way, and what earlier ones have found.
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

/// One walk.
#[derive(Default)]
struct Walk(Monitor<Progress>);

#[derive(Default)]
struct Progress {
    callers: Vec<Caller>,
    /// Its end; of an error the kind and the text, which each gets.
    result: Option<std::result::Result<Usage, (ErrorKind, String)>>,
}

impl Progress {
    fn is_given_up(&self) -> bool {
        self.callers.iter().all(Caller::has_left)
    }
}

impl Walk {
    /// `false` if it has ended, or is about to because all have left.
    fn join(&self, caller: &Caller) -> bool {
        self.0.look(|progress| {
            let can_join = progress.result.is_none() && !progress.is_given_up();
            if can_join {
                progress.callers.push(caller.clone());
            }
            can_join
        })
    }

    /// Waits for the end; `None` if the caller has left before.
    fn wait(&self, caller: &Caller) -> Option<Result<Usage>> {
        /// How soon a caller that leaves frees its thread.
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

/// Ends a walk, also one that panics: others wait for it.
struct Leader<'a> {
    walks: &'a Walks,
    id: SnapshotId,
    walk: Arc<Walk>,
}

impl Leader<'_> {
    fn end(&self, result: &Result<Usage>) {
        let told = match result {
            Ok(usage) => Ok(*usage),
            Err(error) => Err((error.kind(), error.chain())),
        };
        let walk = &self.walk.0;
        walk.change(|progress| {
            progress.result.get_or_insert(told);
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
            "the walk has ended by a bug; the log says where",
        )));
    }
}

impl Walks {
    pub(super) fn figures(&self) -> UsageFigures {
        lock(&self.0).figures
    }

    /// The snapshot is gone, or is a layer now.
    pub(super) fn forget(&self, id: SnapshotId) {
        lock(&self.0).found.remove(&id);
    }

    /// Tells a snapshot's usage: as found at most `max_age` ago, as another walk
    /// finds it that is under way, or as `walk` finds it, which is to end when its
    /// argument says that nobody waits any more.
    fn tell(
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
        // It has begun, and so it is of that moment.
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
    /// What a snapshot itself takes: now, for an active one; as recorded by Commit
    /// for a layer; nothing for a view. By its project quota also the directories
    /// count that are the snapshotter's and overlayfs's own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] if the writable
    /// volume is needed and not there; [`ErrorKind::Cancelled`] if `caller` has
    /// left.
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
        // Of a tree that is being charged, the quota knows a part.
        if volume == Volume::Writable
            && !self.projects.is_uncharged(snapshot.id)
            && let Some(usage) = self.projects.usage(&dirs, snapshot.id, &upper)?
        {
            lock(&self.walks.0).figures.by_quota += 1;
            return Ok(usage);
        }
        let max_age = self.options.quota.usage_max_age;
        self.walks
            .tell(snapshot.id, max_age, caller, |is_given_up| {
                Ok(tree::count_unless(upper, is_given_up)?.usage)
            })
    }

    /// Opens what an active snapshot holds. If it is removed meanwhile, its missing
    /// directory is no loss: it is not found.
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
    fn all_who_ask_at_once_share_one_walk() {
        let walks = Walks::default();
        let count = AtomicUsize::new(0);
        let ask = || {
            walks.tell(
                SnapshotId::new(1),
                Duration::ZERO,
                &Caller::default(),
                |_| {
                    count.fetch_add(1, Ordering::SeqCst);
                    // Until all others have joined.
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
        // One that comes later begins anew, and other snapshots are others.
        walks
            .tell(
                SnapshotId::new(1),
                Duration::ZERO,
                &Caller::default(),
                |_| Ok(USAGE),
            )
            .unwrap();
        assert_eq!(walks.figures().by_walk, 2);
    }

    #[test]
    fn a_walk_goes_on_for_whoever_is_left_and_then_ends() {
        let walks = Walks::default();
        let (first, second) = (Caller::default(), Caller::default());
        let (tell, told) = channel();
        thread::scope(|scope| {
            let leader = scope.spawn(|| {
                let caller = &first;
                walks.tell(SnapshotId::new(1), Duration::ZERO, caller, |is_given_up| {
                    tell.send(()).unwrap();
                    until(is_given_up);
                    Err(left())
                })
            });
            told.recv().unwrap();
            let follower = scope.spawn(|| {
                let never = |_: &dyn Fn() -> bool| panic!("it has to join");
                walks.tell(SnapshotId::new(1), Duration::ZERO, &second, never)
            });
            until(|| walks.figures().by_shared_walk == 1);
            first.leave();
            thread::sleep(Duration::from_millis(30));
            assert!(!leader.is_finished(), "somebody is left");
            second.leave();
            for thread in [leader, follower] {
                let error = thread.join().unwrap().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Cancelled);
            }
        });
        assert!(lock(&walks.0).running.is_empty());
    }

    #[test]
    fn nobody_joins_a_walk_that_is_given_up() {
        let walks = Walks::default();
        let caller = Caller::default();
        walks
            .tell(SnapshotId::new(1), Duration::ZERO, &caller, |_| {
                caller.leave();
                // Asked for while that walk has not noticed yet.
                let other = Caller::default();
                assert_eq!(
                    walks
                        .tell(SnapshotId::new(1), Duration::ZERO, &other, |_| Ok(USAGE))
                        .unwrap(),
                    USAGE
                );
                Err(left())
            })
            .unwrap_err();
    }

    #[test]
    fn what_was_found_is_told_again_until_it_is_too_old() {
        let walks = Walks::default();
        let ask = |max_age| {
            walks.tell(SnapshotId::new(1), max_age, &Caller::default(), |_| {
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
        // What nobody may be told any more is not kept.
        thread::sleep(short);
        let other = SnapshotId::new(2);
        let caller = Caller::default();
        walks.tell(other, short, &caller, |_| Ok(USAGE)).unwrap();
        assert_eq!(lock(&walks.0).found.len(), 1);
    }

    #[test]
    fn an_error_reaches_all_and_is_not_kept() {
        let walks = Walks::default();
        let long = Duration::from_secs(60);
        let fail = || Err(Error::data_loss("gone"));
        thread::scope(|scope| {
            let leader = scope.spawn(|| {
                walks.tell(SnapshotId::new(1), long, &Caller::default(), |_| {
                    until(|| walks.figures().by_shared_walk == 1);
                    fail()
                })
            });
            until(|| walks.figures().by_walk == 1);
            let shared = walks.tell(SnapshotId::new(1), long, &Caller::default(), |_| Ok(USAGE));
            for result in [leader.join().unwrap(), shared] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::DataLoss);
            }
        });
        walks
            .tell(SnapshotId::new(1), long, &Caller::default(), |_| Ok(USAGE))
            .unwrap();
        assert_eq!(walks.figures().by_walk, 2);
    }
}
