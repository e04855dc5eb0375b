//! The rules for keys, on a real database.

use std::time::Instant;

use super::snapshots::Created;
use super::*;
use crate::text::filter::Filters;
use crate::types::{Content, Kind, Labels, SnapshotId, Usage, Volume};

struct Fixture {
    store: Store,
    dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("metadata.db")).unwrap();
    Fixture { store, dir }
}

impl Fixture {
    fn create(&self, kind: Kind, key: &str, parent: &str) -> Result<Created> {
        let mut transaction = self.store.write()?;
        let created = transaction.create_next(&New {
            kind,
            key,
            parent,
            labels: &Labels::from([("key".to_owned(), key.to_owned())]),
            volume: Some(Volume::Image),
        })?;
        transaction.commit()?;
        Ok(created)
    }

    fn prepare(&self, key: &str, parent: &str) -> Result<Created> {
        self.create(Kind::Active, key, parent)
    }

    fn commit(&self, key: &str, name: &str, parent: &str) -> Result<()> {
        let mut transaction = self.store.write()?;
        let id = transaction
            .find(key)?
            .map_or(SnapshotId::new(u64::MAX), |found| found.id);
        transaction.commit_snapshot(&Commit {
            id,
            key,
            name,
            parent,
            labels: &Labels::new(),
            content: Content {
                usage: Usage {
                    size_bytes: 4096,
                    inodes: 3,
                },
                data_bytes: 7,
                marks: None,
            },
            data_bytes: DataBytes::Counted(7),
            is_remapped: false,
        })?;
        transaction.commit()
    }

    fn layer(&self, name: &str, parent: &str) {
        self.prepare("unpack", parent).unwrap();
        self.commit("unpack", name, "").unwrap();
    }

    fn remove(&self, key: &str) -> Result<Place> {
        let mut transaction = self.store.write()?;
        let removed = transaction.remove(key)?;
        transaction.commit()?;
        Ok(removed)
    }

    fn stat(&self, key: &str) -> Result<Snapshot> {
        self.store.read()?.stat(key)
    }

    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let all = Filters::parse::<&str>(&[]).unwrap();
        let each = |snapshot: Snapshot| {
            names.push(snapshot.info.name);
            Ok(())
        };
        self.store.read().unwrap().list(&all, each).unwrap();
        names
    }
}

fn kind_of<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn prepare_refuses_in_containerds_order() {
    let f = fixture();
    f.layer("base", "");
    f.prepare("active", "base").unwrap();
    assert_eq!(
        kind_of(f.prepare("active", "base")),
        ErrorKind::AlreadyExists
    );
    assert_eq!(kind_of(f.prepare("base", "")), ErrorKind::AlreadyExists);
    assert_eq!(kind_of(f.prepare("new", "nowhere")), ErrorKind::NotFound);
    assert_eq!(kind_of(f.prepare("active", "nowhere")), ErrorKind::NotFound);
    assert_eq!(
        kind_of(f.prepare("new", "active")),
        ErrorKind::InvalidArgument
    );
    assert_eq!(f.names(), ["active", "base"], "refusals leave nothing");
}

#[test]
fn commit_refuses_in_containerds_order() {
    let f = fixture();
    f.layer("base", "");
    f.layer("other", "");
    f.prepare("active", "base").unwrap();
    f.create(Kind::View, "view", "base").unwrap();
    assert_eq!(
        kind_of(f.commit("nowhere", "base", "")),
        ErrorKind::AlreadyExists
    );
    assert_eq!(kind_of(f.commit("nowhere", "new", "")), ErrorKind::NotFound);
    assert_eq!(
        kind_of(f.commit("view", "new", "")),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        kind_of(f.commit("base", "new", "")),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        kind_of(f.commit("active", "new", "other")),
        ErrorKind::InvalidArgument
    );
    f.commit("active", "new", "base").unwrap();
    assert_eq!(f.stat("new").unwrap().info.parent, "base");
}

#[test]
fn a_commit_keeps_the_id_and_nothing_else() {
    let f = fixture();
    let prepared = f.prepare("active", "").unwrap();
    let before = f.stat("active").unwrap();
    f.commit("active", "layer", "").unwrap();
    let after = f.stat("layer").unwrap();
    assert_eq!(after.id, prepared.id);
    assert_eq!(after.info.kind, Kind::Committed);
    assert!(after.info.labels.is_empty(), "labels are replaced");
    assert!(after.info.created > before.info.created);
    assert_eq!(after.info.created, after.info.updated);
    assert_eq!(after.usage.inodes, 3);
    assert_eq!(kind_of(f.stat("active")), ErrorKind::NotFound);
}

#[test]
fn a_parent_may_be_named_as_late_as_commit() {
    let f = fixture();
    // The upper layer was prepared first, so its parent has the higher id.
    f.prepare("upper", "").unwrap();
    f.prepare("running", "").unwrap();
    f.layer("base", "");
    assert_eq!(
        kind_of(f.commit("upper", "top", "nowhere")),
        ErrorKind::NotFound
    );
    assert_eq!(
        kind_of(f.commit("upper", "top", "running")),
        ErrorKind::FailedPrecondition
    );
    f.commit("upper", "top", "base").unwrap();
    let ids: Vec<_> = f.prepare("web", "top").unwrap().ancestors;
    let ids: Vec<_> = ids.iter().map(|layer| layer.id.number()).collect();
    assert_eq!(ids, [1, 3]);
    assert_eq!(kind_of(f.remove("base")), ErrorKind::FailedPrecondition);
}

#[test]
fn ids_are_never_given_out_twice() {
    let f = fixture();
    let first = f.prepare("a", "").unwrap().id;
    assert_eq!(first, SnapshotId::new(1));
    assert_eq!(f.remove("a").unwrap().id, first);
    assert_eq!(kind_of(f.remove("a")), ErrorKind::NotFound);
    assert_eq!(f.prepare("a", "").unwrap().id, SnapshotId::new(2));
}

#[test]
fn what_others_stand_on_is_not_removed() {
    let f = fixture();
    f.layer("base", "");
    f.prepare("web", "base").unwrap();
    let refused = f.remove("base").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    assert!(refused.chain().contains("web"), "{}", refused.chain());
    f.remove("web").unwrap();
    f.remove("base").unwrap();
    assert!(f.names().is_empty());
}

#[test]
fn a_chain_of_400_is_listed_nearest_first() {
    let f = fixture();
    let mut parent = String::new();
    for number in 0..400 {
        let name = format!("layer {number:03}");
        f.layer(&name, &parent);
        parent = name;
    }
    let created = f.prepare("web", &parent).unwrap();
    let ids: Vec<_> = created
        .ancestors
        .iter()
        .map(|layer| layer.id.number())
        .collect();
    assert_eq!(ids, (1..=400).rev().collect::<Vec<_>>());
}

#[test]
fn a_chain_that_ends_nowhere_is_damage() {
    let f = fixture();
    f.layer("lower", "");
    f.layer("upper", "lower");
    let other = Connection::open(f.dir.path().join("metadata.db")).unwrap();
    other
        .execute("UPDATE snapshot SET parent_id = 2 WHERE id = 1", [])
        .unwrap();
    let error = f.prepare("web", "upper").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DataLoss);
    assert!(error.chain().contains("layer 2"), "{}", error.chain());
}

#[test]
fn what_is_asked_at_one_moment_is_of_one_moment() {
    let f = fixture();
    f.prepare("before", "").unwrap();
    let reader = f.store.read().unwrap();
    let found = reader.at_one_moment(|| {
        reader.stat("before")?;
        f.prepare("meanwhile", "")?;
        reader.find("meanwhile")
    });
    assert_eq!(found.unwrap(), None);
    assert!(reader.find("meanwhile").unwrap().is_some());
    let failed: Result<()> = reader.at_one_moment(|| reader.stat("none").map(drop));
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::NotFound);
    f.prepare("after", "").unwrap();
    assert!(reader.find("after").unwrap().is_some());
}

#[test]
fn listing_is_in_order_of_name_and_filtered() {
    let f = fixture();
    for key in ["b", "a/b", "é", "B", "a"] {
        f.prepare(key, "").unwrap();
    }
    assert_eq!(f.names(), ["B", "a", "a/b", "b", "é"]);
    let filters = Filters::parse(&["name==a", "labels.key~=^B"]).unwrap();
    let mut names = Vec::new();
    let each = |snapshot: Snapshot| {
        names.push(snapshot.info.name);
        Ok(())
    };
    f.store.read().unwrap().list(&filters, each).unwrap();
    assert_eq!(names, ["B", "a"]);
}

#[test]
fn a_transaction_that_is_dropped_leaves_no_trace() {
    let f = fixture();
    {
        let transaction = f.store.write().unwrap();
        let labels = Labels::new();
        let new = New {
            kind: Kind::Active,
            key: "gone",
            parent: "",
            labels: &labels,
            volume: None,
        };
        transaction.create_next(&new).unwrap();
    }
    assert!(f.names().is_empty());
    assert!(f.store.read().unwrap().is_untouched().unwrap());
    f.prepare("there", "").unwrap();
    assert!(!f.store.read().unwrap().is_untouched().unwrap());
}

#[test]
fn updates_change_labels_and_the_later_time_only() {
    let f = fixture();
    f.prepare("web", "").unwrap();
    let before = f.stat("web").unwrap();
    let mut transaction = f.store.write().unwrap();
    let changes = vec![
        LabelChange::Set("a".into(), "1".into()),
        LabelChange::Delete("key".into()),
    ];
    let updated = transaction.update("web", changes).unwrap();
    transaction.commit().unwrap();
    assert_eq!(updated, f.stat("web").unwrap());
    assert_eq!(
        updated.info.labels,
        Labels::from([("a".into(), "1".into())])
    );
    assert_eq!(updated.info.created, before.info.created);
    assert!(updated.info.updated > before.info.updated);
}

#[test]
fn the_first_bytes_of_a_file_show_its_format() {
    let f = fixture();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    assert_eq!(probe_format(&path("none")).unwrap(), FileFormat::Absent);
    assert_eq!(probe_format(&f.store.path).unwrap(), FileFormat::Ours);
    let other = Connection::open(path("other")).unwrap();
    other.execute_batch("CREATE TABLE t (x)").unwrap();
    assert_eq!(
        probe_format(&path("other")).unwrap(),
        FileFormat::OtherSqlite
    );
    std::fs::write(path("text"), "hello").unwrap();
    assert_eq!(probe_format(&path("text")).unwrap(), FileFormat::Unknown);
    let mut bolt = vec![0; 4096];
    bolt[16..20].copy_from_slice(&0xED0C_DAED_u32.to_le_bytes());
    std::fs::write(path("bolt"), bolt).unwrap();
    assert_eq!(probe_format(&path("bolt")).unwrap(), FileFormat::Bolt);
}

#[test]
fn a_copy_follows_changes_and_nothing_else() {
    let fixture = fixture();
    let store = &fixture.store;
    let copy = fixture.dir.path().join("metadata.db.copy");
    let (now, moment) = (Instant::now(), Duration::from_millis(1));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.await_change(now, moment));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        fixture.prepare("web", "").unwrap();
        assert!(waiting.join().unwrap());
    });
    store.copy().unwrap();
    let copied = std::fs::read(&copy).unwrap();
    let names = |store: &Store| {
        let mut names = Vec::new();
        let filters = Filters::parse::<&str>(&[]).unwrap();
        let listed = store.read().unwrap().list(&filters, |snapshot| {
            names.push(snapshot.info.name);
            Ok(())
        });
        listed.map(|()| names).unwrap()
    };
    assert_eq!(names(&Store::open_read_only(&copy).unwrap()), ["web"]);
    assert!(matches!(
        probe_completeness(&copy),
        Ok(Completeness::Copy(_))
    ));

    // A transaction that changes nothing does not count as a change.
    store.write().unwrap().commit().unwrap();
    store.copy().unwrap();
    assert_eq!(std::fs::read(&copy).unwrap(), copied);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.await_change(now, moment));
        store.end_waiting();
        assert!(!waiting.join().unwrap());
    });
}

#[test]
fn a_missing_log_is_noticed_between_begin_and_close() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.db");
    let elsewhere = dir.path().join("copied-alone.db");
    let store = Store::open(&path).unwrap();
    store.begin_use().unwrap();
    std::fs::copy(&path, &elsewhere).unwrap();
    assert_eq!(
        probe_completeness(&elsewhere).unwrap(),
        Completeness::LogMissing
    );
    assert_eq!(probe_completeness(&path).unwrap(), Completeness::Whole);
    store.close().unwrap();
    assert_eq!(probe_completeness(&path).unwrap(), Completeness::Whole);
    assert!(store.write().is_err());
}
