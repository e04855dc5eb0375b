//! Statements about project ids: which are given out, to which snapshot, and
//! with which limits. An id is recorded before anything is charged to it, and its
//! record is deleted once nothing is charged to the id any more.

use rusqlite::{Row, params};

use super::Transaction;
use super::sql::{Number, Rows};
use crate::error::Result;
use crate::types::{Limits, ProjectId, SnapshotId};

/// A project id that is given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Project {
    /// The project id.
    pub project: ProjectId,
    /// The snapshot that the id was given to, which may be removed by now; `None` if no
    /// row was ever entered for that snapshot.
    pub snapshot: Option<SnapshotId>,
    /// How much the project may take.
    pub limits: Limits,
}

fn project(row: &Row<'_>) -> rusqlite::Result<Project> {
    let limit = |column| row.get::<_, Option<Number>>(column);
    Ok(Project {
        project: row.get(0)?,
        snapshot: row.get(1)?,
        limits: Limits {
            max_bytes: limit(2)?.map(|Number(bytes)| bytes),
            max_inodes: limit(3)?.map(|Number(inodes)| inodes),
        },
    })
}

const SELECT: &str = "SELECT project, snapshot_id, max_bytes, max_inodes FROM project";

impl Rows {
    /// All project ids that are given out, in order.
    pub fn projects(&self) -> Result<Vec<Project>> {
        self.list_projects("")
    }

    /// The project ids whose snapshot is not on the writable volume any more. Such an id can
    /// be given out again once nothing is charged to it.
    pub fn loose_projects(&self) -> Result<Vec<Project>> {
        // A layer that has moved may have left a directory on the writable volume.
        self.list_projects(
            "WHERE NOT EXISTS (SELECT 1 FROM snapshot s
             WHERE s.id = project.snapshot_id AND s.volume = 1)",
        )
    }

    fn list_projects(&self, which: &str) -> Result<Vec<Project>> {
        let sql = format!("{SELECT} {which} ORDER BY project");
        self.all(&sql, "list the project ids", project)
    }

    /// How many project ids are given out.
    pub fn count_projects(&self) -> Result<u64> {
        let sql = "SELECT count(*) FROM project";
        let count = self.one(sql, [], "count the project ids", |row| row.get(0))?;
        Ok(count.map_or(0, |Number(count)| count))
    }

    /// The project of a snapshot; `None` if it has no project.
    pub fn project_of(&self, id: SnapshotId) -> Result<Option<Project>> {
        let sql = format!("{SELECT} WHERE snapshot_id = ?1");
        let doing = format_args!("look up the project of snapshot {id}");
        self.one(&sql, [id], doing, project)
    }

    /// Whether a project id is given out.
    pub fn is_project_taken(&self, project: ProjectId) -> Result<bool> {
        let sql = "SELECT 1 FROM project WHERE project = ?1";
        let doing = format_args!("look up project {project}");
        let found = self.one(sql, [project], doing, |_| Ok(()))?;
        Ok(found.is_some())
    }
}

impl Transaction<'_> {
    /// Records that a project id is given out. Returns an error if the id, or the snapshot,
    /// is recorded already.
    pub fn record_project(&self, given: &Project) -> Result<()> {
        self.execute(
            "INSERT INTO project (project, snapshot_id, max_bytes, max_inodes)
             VALUES (?1, ?2, ?3, ?4)",
            params![
                given.project,
                given.snapshot,
                given.limits.max_bytes.map(Number),
                given.limits.max_inodes.map(Number),
            ],
            format_args!("record project {}", given.project),
        )
    }

    /// Records how much a project may take.
    pub fn record_limits(&self, project: ProjectId, limits: Limits) -> Result<()> {
        self.execute(
            "UPDATE project SET max_bytes = ?2, max_inodes = ?3 WHERE project = ?1",
            params![
                project,
                limits.max_bytes.map(Number),
                limits.max_inodes.map(Number)
            ],
            format_args!("record the limits of project {project}"),
        )
    }

    /// Deletes the record of a project id, which may then be given out again.
    pub fn forget_project(&self, project: ProjectId) -> Result<()> {
        let sql = "DELETE FROM project WHERE project = ?1";
        let doing = format_args!("delete the record of project {project}");
        self.execute(sql, [project], doing)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{New, Store};
    use super::*;
    use crate::types::{Kind, Labels, Volume};

    #[test]
    fn a_project_outlives_its_snapshot_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("metadata.db")).unwrap();
        let mut transaction = store.write().unwrap();
        let rows = &transaction;
        let new = |key| {
            let created = rows.create_next(&New {
                kind: Kind::Active,
                key,
                parent: "",
                labels: &Labels::new(),
                volume: Some(Volume::Writable),
            });
            created.unwrap().id
        };
        let given = |number, snapshot| Project {
            project: ProjectId::new(number),
            snapshot,
            limits: Limits {
                max_bytes: Some(1 << 40),
                max_inodes: None,
            },
        };
        let (one, two) = (new("one"), new("two"));
        rows.record_project(&given(7, Some(one))).unwrap();
        rows.record_project(&given(7, Some(two))).unwrap_err();
        rows.record_project(&given(8, Some(one))).unwrap_err();
        rows.record_project(&given(3, Some(two))).unwrap();
        // A project id of directories that belong to no snapshot.
        rows.record_project(&given(4, None)).unwrap();
        rows.record_project(&given(5, None)).unwrap();
        assert_eq!(rows.project_of(one).unwrap(), Some(given(7, Some(one))));
        let numbers = |projects: Vec<Project>| -> Vec<u32> {
            projects
                .iter()
                .map(|given| given.project.number())
                .collect()
        };
        assert_eq!(numbers(rows.projects().unwrap()), [3, 4, 5, 7]);
        assert_eq!(numbers(rows.loose_projects().unwrap()), [4, 5]);

        rows.remove("one").unwrap();
        assert_eq!(numbers(rows.loose_projects().unwrap()), [4, 5, 7]);
        assert!(rows.is_project_taken(ProjectId::new(7)).unwrap());
        rows.forget_project(ProjectId::new(7)).unwrap();
        assert!(!rows.is_project_taken(ProjectId::new(7)).unwrap());
        assert_eq!(rows.count_projects().unwrap(), 3);

        let limits = Limits {
            max_bytes: None,
            max_inodes: Some(9),
        };
        rows.record_limits(ProjectId::new(3), limits).unwrap();
        let found = rows.project_of(two).unwrap().unwrap();
        assert_eq!(found.limits, limits);
        transaction.commit().unwrap();
    }
}
