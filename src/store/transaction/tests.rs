//! Several callers at once, each in a thread that waits for its turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use super::*;
use crate::store::New;
use crate::types::{Kind, Labels, SnapshotId, Volume};

struct Fixture {
    store: Store,
    log: PathBuf,
    is_begun: AtomicBool,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.db");
    let store = Store::open(&path).unwrap();
    store.begin_use().unwrap();
    // From here on, the log only grows.
    let mut transaction = store.write().unwrap();
    transaction.record_fact("test", "1").unwrap();
    transaction.commit().unwrap();
    drop(transaction);
    Fixture {
        store,
        log: dir.path().join("metadata.db-wal"),
        is_begun: AtomicBool::new(false),
        _dir: dir,
    }
}

impl Fixture {
    /// How often the database was made durable, according to its log: in the last
    /// frame of a transaction, a field contains the size of the database
    /// (SQLite's file format, 4.1).
    fn commits(&self) -> usize {
        let log = std::fs::read(&self.log).unwrap();
        let number = |at: usize| u32::from_be_bytes(log[at..at + 4].try_into().unwrap());
        let page_size = number(8) as usize;
        (32..log.len())
            .step_by(24 + page_size)
            // Other frames are from an earlier round through the log.
            .filter(|frame| log[frame + 8..frame + 16] == log[16..24])
            .filter(|frame| number(frame + 4) != 0)
            .count()
    }

    fn exists(&self, key: &str) -> bool {
        self.store.read().unwrap().find(key).unwrap().is_some()
    }

    /// Waits until this number of callers wait for the writer.
    fn await_coming(&self, callers: usize) {
        while self.store.writer.coming.load(Ordering::SeqCst) != callers {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Enters a snapshot while this number of other callers wait, and returns
    /// the result.
    fn first(&self, comers: usize) -> Result<()> {
        self.store.together(|transaction| {
            self.is_begun.store(true, Ordering::SeqCst);
            self.await_coming(comers);
            enter(transaction, "first").map(drop)
        })
    }

    fn await_first(&self) {
        while !self.is_begun.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn enter(transaction: &Transaction<'_>, key: &str) -> Result<SnapshotId> {
    let created = transaction.create_next(&New {
        kind: Kind::Active,
        key,
        parent: "",
        labels: &Labels::new(),
        volume: Some(Volume::Writable),
    })?;
    Ok(created.id)
}

fn add(store: &Store, key: &str) -> Result<SnapshotId> {
    store.together(|transaction| enter(transaction, key))
}

#[test]
fn those_who_come_at_once_become_durable_at_once() {
    let fixture = fixture();
    let before = fixture.commits();
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(3));
        fixture.await_first();
        let comers = ["a", "b", "c"].map(|key| scope.spawn(|| add(&fixture.store, key)));
        first.join().unwrap().unwrap();
        let mut ids = comers.map(|comer| comer.join().unwrap().unwrap().number());
        ids.sort_unstable();
        assert_eq!(ids, [2, 3, 4]);
    });
    assert_eq!(fixture.commits(), before + 1);
    assert!(
        ["first", "a", "b", "c"]
            .iter()
            .all(|key| fixture.exists(key))
    );
    add(&fixture.store, "later").unwrap();
    assert_eq!(fixture.commits(), before + 2);
}

#[test]
fn no_more_come_together_than_may_be_left_by_a_crash() {
    let fixture = fixture();
    let before = fixture.commits();
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(MOST_TOGETHER));
        fixture.await_first();
        for number in 0..MOST_TOGETHER {
            let store = &fixture.store;
            scope.spawn(move || add(store, &number.to_string()).unwrap());
        }
        first.join().unwrap().unwrap();
    });
    assert_eq!(fixture.commits(), before + 2);
}

#[test]
fn a_refused_one_takes_nothing_with_it() {
    let fixture = fixture();
    let before = fixture.commits();
    let shared = &fixture;
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(3));
        fixture.await_first();
        // The last caller, which may be refused, has to end the batch.
        let comers = ["first", "a", "first"].map(|key| {
            scope.spawn(move || {
                let added = add(&shared.store, key);
                // The snapshot because of which the caller was refused is visible by then.
                assert!(shared.exists("first"));
                added.map_err(|error| error.kind()).err()
            })
        });
        first.join().unwrap().unwrap();
        let kinds = comers.map(|comer| comer.join().unwrap());
        let taken = Some(ErrorKind::AlreadyExists);
        assert_eq!(kinds, [taken, None, taken]);
    });
    assert!(fixture.exists("first") && fixture.exists("a"));
    assert_eq!(fixture.commits(), before + 1);
}

#[test]
fn an_only_one_that_is_refused_leaves_nothing() {
    let fixture = fixture();
    let before = fixture.commits();
    let refused = fixture.store.together(|transaction| {
        enter(transaction, "refused")?;
        enter(transaction, "refused")
    });
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert!(!fixture.exists("refused"));
    assert_eq!(fixture.commits(), before);
    assert_eq!(add(&fixture.store, "next").unwrap().number(), 1);
}

/// A change that cannot be committed.
const ORPHAN: &str = "PRAGMA defer_foreign_keys = ON;
    INSERT INTO snapshot (name, parent_id, kind, volume, created_ns, updated_ns, labels)
    VALUES ('orphan', 99, 1, 1, 0, 0, x'');";

#[test]
fn a_batch_that_cannot_be_made_durable_fails_as_a_whole() {
    let fixture = fixture();
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(3));
        fixture.await_first();
        let failing = scope.spawn(|| {
            fixture.store.together(|transaction| {
                transaction.connection().execute_batch(ORPHAN).unwrap();
                Ok(())
            })
        });
        let second = scope.spawn(|| {
            fixture
                .store
                .together(|transaction| enter(transaction, "second"))
        });
        let refused = scope.spawn(|| add(&fixture.store, "first"));
        let first = first.join().unwrap();
        let kinds = [
            first.unwrap_err().kind(),
            failing.join().unwrap().map(drop).unwrap_err().kind(),
            second.join().unwrap().map(drop).unwrap_err().kind(),
        ];
        assert_eq!(kinds, [ErrorKind::Internal; 3]);
        // This change was refused because of a row that was never committed.
        let refused = refused.join().unwrap().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable);
    });
    let names = ["first", "second", "orphan"].map(|key| fixture.exists(key));
    assert_eq!(names, [false; 3]);
}

#[test]
fn all_members_return_that_sqlite_has_rolled_back() {
    let fixture = fixture();
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(1));
        fixture.await_first();
        let refused = scope.spawn(|| {
            fixture.store.together(|transaction| {
                // SQLite rolls back by itself on a full disk.
                transaction.connection().execute_batch("ROLLBACK").unwrap();
                Ok(())
            })
        });
        for result in [first, refused].map(|caller| caller.join().unwrap()) {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
        }
    });
    assert!(!fixture.exists("first"));
    assert_eq!(add(&fixture.store, "next").unwrap().number(), 1);
}

#[test]
fn a_panic_ends_one_request_and_no_batch() {
    let fixture = fixture();
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(1));
        fixture.await_first();
        let panicking = scope.spawn(|| {
            fixture.store.together(|transaction| {
                enter(transaction, "second")?;
                if transaction.find("second")?.is_some() {
                    panic!("a bug");
                }
                Ok(())
            })
        });
        panicking.join().unwrap_err();
        first.join().unwrap().unwrap();
    });
    assert!(fixture.exists("first") && !fixture.exists("second"));
}

#[test]
fn who_writes_alone_finds_all_before_durable() {
    let fixture = fixture();
    thread::scope(|scope| {
        let first = scope.spawn(|| fixture.first(1));
        fixture.await_first();
        let alone = fixture.store.write().unwrap();
        assert!(fixture.exists("first"));
        drop(alone);
        first.join().unwrap().unwrap();
    });
}

/// After a power cut, the log of a failed commit would bring the commit back.
#[test]
fn what_a_failed_commit_may_have_left_is_written_over() {
    let fixture = fixture();
    let overwritten = || fixture.store.read().unwrap().fact("overwritten").unwrap();
    let fail = || {
        let failed = fixture.store.together(|transaction| {
            transaction.connection().execute_batch(ORPHAN).unwrap();
            Ok(())
        });
        failed.unwrap_err();
    };
    let before = overwritten();
    fail();
    let first = overwritten();
    assert_ne!(first, before);
    add(&fixture.store, "next").unwrap();
    assert_eq!(overwritten(), first);
    fail();
    assert_ne!(overwritten(), first);
}

#[test]
fn a_batch_whose_end_panics_fails_for_each_member() {
    let fixture = fixture();
    let store = &fixture.store;
    let state = &store.writer.state;
    // With this count, the batch is left open as if another caller waited.
    store.writer.coming.fetch_add(1, Ordering::SeqCst);
    thread::scope(|scope| {
        let members = ["a", "b"].map(|key| scope.spawn(move || add(store, key)));
        while lock(state)
            .batch
            .as_ref()
            .is_none_or(|batch| batch.members < 2)
        {
            thread::sleep(Duration::from_millis(1));
        }
        store.writer.coming.fetch_sub(1, Ordering::SeqCst);
        let mut writer = lock(state);
        let end = || store.end_batch_by(&mut writer, |_| panic!("a bug"));
        assert!(catch_unwind(AssertUnwindSafe(end)).is_err());
        drop(writer);
        for member in members {
            let error = member.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Internal);
        }
    });
    assert!(!fixture.exists("a") && !fixture.exists("b"));
    add(store, "b").unwrap();
}
