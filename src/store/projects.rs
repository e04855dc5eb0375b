//! Statements about project ids: which are given out, to which snapshot, and
//! how much that may take. An id is recorded before anything is charged to it,
//! and struck out after nothing is.

use std::borrow::Borrow;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::convert::{damaged, id_from_sql, sql_id, sql_number};
use super::rows::Rows;
use super::sql_error;
use crate::error::Result;
use crate::types::{Limits, ProjectId, SnapshotId};

/// A project id that is given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Project {
    /// The id.
    pub project: ProjectId,
    /// The snapshot that it was given to, which may be gone; `None` if that was
    /// never entered.
    pub snapshot: Option<SnapshotId>,
    /// How much it may take.
    pub limits: Limits,
}

type Raw = (i64, Option<i64>, Option<i64>, Option<i64>);

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
}

fn project((project, snapshot, max_bytes, max_inodes): Raw) -> Result<Project> {
    let number = u32::try_from(project);
    let number = number.map_err(|_| damaged(format!("{project} is no project id")))?;
    let limit = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok());
    Ok(Project {
        project: ProjectId::new(number),
        snapshot: snapshot.map(id_from_sql).transpose()?,
        limits: Limits {
            max_bytes: limit(max_bytes),
            max_inodes: limit(max_inodes),
        },
    })
}

fn sql_project(project: ProjectId) -> i64 {
    i64::from(project.number())
}

const COLUMNS: &str = "SELECT project, snapshot_id, max_bytes, max_inodes FROM project";
/// A layer that has left the writable volume may have left its directory there.
const LOOSE: &str = "WHERE NOT EXISTS (SELECT 1 FROM snapshot s
     WHERE s.id = project.snapshot_id AND s.volume = 1)";

impl<C: Borrow<Connection>> Rows<C> {
    /// All ids that are given out, in order.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn projects(&self) -> Result<Vec<Project>> {
        self.list_projects("")
    }

    /// Those whose snapshot is not on the writable volume any more: to be given
    /// back when nothing is charged to them.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn loose_projects(&self) -> Result<Vec<Project>> {
        self.list_projects(LOOSE)
    }

    /// How many ids are given out.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn count_projects(&self) -> Result<u64> {
        let count: i64 = self
            .connection()
            .prepare_cached("SELECT count(*) FROM project")
            .and_then(|mut query| query.query_row([], |row| row.get(0)))
            .map_err(|error| sql_error(error, "count the project ids"))?;
        Ok(count.try_into().unwrap_or(0))
    }

    fn list_projects(&self, which: &str) -> Result<Vec<Project>> {
        let doing = |error| sql_error(error, "list the project ids");
        let mut query = self
            .connection()
            .prepare_cached(&format!("{COLUMNS} {which} ORDER BY project"))
            .map_err(doing)?;
        let rows = query.query_map([], raw).map_err(doing)?;
        rows.map(|row| project(row.map_err(doing)?)).collect()
    }

    /// The id that a snapshot has, if it has one.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn project_of(&self, id: SnapshotId) -> Result<Option<Project>> {
        self.connection()
            .prepare_cached(&format!("{COLUMNS} WHERE snapshot_id = ?1"))
            .and_then(|mut query| query.query_row([sql_id(id)], raw).optional())
            .map_err(|error| sql_error(error, format!("look up the project of snapshot {id}")))?
            .map(project)
            .transpose()
    }

    /// Whether an id is given out.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn is_project_taken(&self, project: ProjectId) -> Result<bool> {
        self.connection()
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM project WHERE project = ?1)")
            .and_then(|mut query| query.query_row([sql_project(project)], |row| row.get(0)))
            .map_err(|error| sql_error(error, format!("look up project {project}")))
    }
}

impl Rows<&Connection> {
    /// Records that an id is given out.
    ///
    /// # Errors
    ///
    /// Those of the database; also if the id, or the snapshot, is recorded already.
    pub fn record_project(&self, given: &Project) -> Result<()> {
        self.connection()
            .prepare_cached(
                "INSERT INTO project (project, snapshot_id, max_bytes, max_inodes)
                 VALUES (?1, ?2, ?3, ?4)",
            )
            .and_then(|mut insert| {
                insert.execute(params![
                    sql_project(given.project),
                    given.snapshot.map(sql_id),
                    given.limits.max_bytes.map(sql_number),
                    given.limits.max_inodes.map(sql_number),
                ])
            })
            .map_err(|error| sql_error(error, format!("record project {}", given.project)))?;
        Ok(())
    }

    /// Records how much a project may take.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn record_limits(&self, project: ProjectId, limits: Limits) -> Result<()> {
        self.connection()
            .prepare_cached("UPDATE project SET max_bytes = ?2, max_inodes = ?3 WHERE project = ?1")
            .and_then(|mut update| {
                update.execute(params![
                    sql_project(project),
                    limits.max_bytes.map(sql_number),
                    limits.max_inodes.map(sql_number),
                ])
            })
            .map_err(|error| sql_error(error, format!("record the limits of project {project}")))?;
        Ok(())
    }

    /// Strikes an id out: it may be given out again.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn forget_project(&self, project: ProjectId) -> Result<()> {
        self.connection()
            .prepare_cached("DELETE FROM project WHERE project = ?1")
            .and_then(|mut delete| delete.execute([sql_project(project)]))
            .map_err(|error| sql_error(error, format!("forget project {project}")))?;
        Ok(())
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
        let rows = transaction.rows();
        let new = |key| {
            let created = rows.create(&New {
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
        // Of directories that no snapshot has.
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
