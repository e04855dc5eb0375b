//! Several callers at once, each in a thread that waits for its turn.

use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use super::*;
use crate::store::New;
use crate::types::{Kind, Labels, SnapshotId, Volume};

struct Fixture {
    store: Store,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.db");
    let store = Store::open(&path).unwrap();
    store.begin_use().unwrap();
    // The first one begins the log anew: from now on it only grows.
    let mut transaction = store.write().unwrap();
    transaction.rows().record_fact("test", "1").unwrap();
    transaction.commit().unwrap();
    drop(transaction);
    Fixture {
        store,
        log: dir.path().join("metadata.db-wal"),
        _dir: dir,
    }
}

impl Fixture {
    /// How often the database has become durable, by its log: the last frame of a
    /// transaction tells the size of the database (SQLite's file format, 4.1).
    fn commits(&self) -> usize {
        let log = std::fs::read(&self.log).unwrap();
        let number = |at: usize| u32::from_be_bytes(log[at..at + 4].try_into().unwrap());
        let page_size = number(8) as usize;
        (32..log.len())
            .step_by(24 + page_size)
            .filter(|frame| number(frame + 4) != 0)
            .count()
    }

    fn exists(&self, key: &str) -> bool {
        self.store.read().unwrap().find(key).unwrap().is_some()
    }

    /// Waits until so many callers wait for the writer.
    fn await_coming(&self, callers: usize) {
        while self.store.writer.coming.load(Ordering::SeqCst) != callers {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Begins a transaction, has `comers` wait for it, commits it, and tells what
    /// came of it.
    fn first_before<'scope, T>(
        &'scope self,
        comers: &[ScopedJoinHandle<'scope, T>],
        mut first: Transaction<'_>,
    ) -> Result<()> {
        self.await_coming(comers.len());
        enter(&first, "first").unwrap();
        first.commit()
    }
}

fn enter(transaction: &Transaction<'_>, key: &str) -> Result<SnapshotId> {
    let created = transaction.rows().create(&New {
        kind: Kind::Active,
        key,
        parent: "",
        labels: &Labels::new(),
        volume: Some(Volume::Writable),
    })?;
    Ok(created.id)
}

fn add(store: &Store, key: &str) -> Result<SnapshotId> {
    let mut transaction = store.write_together()?;
    let id = enter(&transaction, key)?;
    transaction.commit()?;
    Ok(id)
}

#[test]
fn those_who_come_at_once_become_durable_at_once() {
    let fixture = fixture();
    let before = fixture.commits();
    thread::scope(|scope| {
        let first = fixture.store.write_together().unwrap();
        let comers = ["a", "b", "c"].map(|key| scope.spawn(|| add(&fixture.store, key)));
        fixture.first_before(&comers, first).unwrap();
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
fn a_refused_one_takes_nothing_with_it() {
    let fixture = fixture();
    let before = fixture.commits();
    thread::scope(|scope| {
        let first = fixture.store.write_together().unwrap();
        // Also the last of them may be refused, and has to end the batch.
        let comers = ["first", "a", "first"].map(|key| scope.spawn(|| add(&fixture.store, key)));
        fixture.first_before(&comers, first).unwrap();
        let results = comers.map(|comer| comer.join().unwrap());
        let kinds = results.map(|result| result.map_err(|error| error.kind()).err());
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
    let transaction = fixture.store.write_together().unwrap();
    enter(&transaction, "refused").unwrap();
    drop(transaction);
    assert!(!fixture.exists("refused"));
    assert_eq!(fixture.commits(), before);
    assert_eq!(add(&fixture.store, "next").unwrap().number(), 1);
}

#[test]
fn a_batch_that_cannot_be_made_durable_fails_as_a_whole() {
    let fixture = fixture();
    let undone = AtomicU32::new(0);
    // What has to be undone takes a while.
    let fail = |mut transaction: Transaction<'_>| {
        let error = transaction.commit().unwrap_err();
        thread::sleep(Duration::from_millis(50));
        undone.fetch_add(1, Ordering::SeqCst);
        drop(transaction);
        error.kind()
    };
    thread::scope(|scope| {
        let first = fixture.store.write_together().unwrap();
        let comers = [false, true].map(|is_last| {
            let (fixture, fail) = (&fixture, &fail);
            scope.spawn(move || {
                if is_last {
                    fixture.await_coming(1);
                    thread::sleep(Duration::from_millis(20));
                }
                let transaction = fixture.store.write_together().unwrap();
                let orphan = "PRAGMA defer_foreign_keys = ON;
                    INSERT INTO snapshot
                        (name, parent_id, kind, volume, created_ns, updated_ns, labels)
                    VALUES ('orphan', 99, 1, 1, 0, 0, x'');";
                let connection = transaction.rows();
                match is_last {
                    true => connection.connection().execute_batch(orphan).unwrap(),
                    false => drop(enter(&transaction, "second").unwrap()),
                }
                fail(transaction)
            })
        });
        let error = fixture.first_before(&comers, first).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        let id = add(&fixture.store, "next").unwrap();
        assert_eq!((id.number(), undone.load(Ordering::SeqCst)), (1, 2));
        for comer in comers {
            assert_eq!(comer.join().unwrap(), ErrorKind::Internal);
        }
    });
    let names = ["first", "second", "orphan", "next"].map(|key| fixture.exists(key));
    assert_eq!(names, [false, false, false, true]);
}

#[test]
fn what_sqlite_has_rolled_back_is_told_to_all() {
    let fixture = fixture();
    thread::scope(|scope| {
        let first = fixture.store.write_together().unwrap();
        let comer = scope.spawn(|| {
            let transaction = fixture.store.write_together().unwrap();
            // As SQLite does on a full disk.
            let rows = transaction.rows();
            rows.connection().execute_batch("ROLLBACK").unwrap();
        });
        let error = fixture.first_before(&[comer], first).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
    });
    assert!(!fixture.exists("first"));
    assert_eq!(add(&fixture.store, "next").unwrap().number(), 1);
}

#[test]
fn who_writes_alone_finds_all_before_durable() {
    let fixture = fixture();
    thread::scope(|scope| {
        let first = fixture.store.write_together().unwrap();
        let comer = scope.spawn(|| {
            let transaction = fixture.store.write().unwrap();
            let is_durable = fixture.exists("first");
            drop(transaction);
            is_durable
        });
        fixture
            .first_before(std::slice::from_ref(&comer), first)
            .unwrap();
        assert!(comer.join().unwrap());
    });
}
