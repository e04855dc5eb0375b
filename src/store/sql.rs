//! Between SQLite and the rest of the store: how a statement is run, how our types are
//! stored in columns, and which [`ErrorKind`] a failure has. A value that a sound
//! database cannot contain is [`ErrorKind::DataLoss`].

use std::fmt::Display;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, Null, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, OptionalExtension, Params, Row};

use super::snapshots::DataBytes;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Kind, ProjectId, SnapshotId, Timestamp, Volume};

/// The rows of the database, as one connection sees them: a reader's, or a
/// transaction's.
pub struct Rows {
    connection: Connection,
}

/// Running statements. In each function, `doing` names the step in errors.
impl Rows {
    pub(super) fn new(connection: Connection) -> Rows {
        Rows { connection }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn connection_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Runs a statement that returns no rows.
    pub(super) fn execute(
        &self,
        sql: &str,
        params: impl Params,
        doing: impl Display,
    ) -> Result<()> {
        let statement = self.connection.prepare_cached(sql);
        let executed = statement.and_then(|mut statement| statement.execute(params));
        executed
            .map(drop)
            .map_err(|error| sql_error(error, doing.to_string()))
    }

    /// Reads the only row of a query's result; `None` if the result is empty.
    pub(super) fn one<T>(
        &self,
        sql: &str,
        params: impl Params,
        doing: impl Display,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        let query = self.connection.prepare_cached(sql);
        let found = query.and_then(|mut query| query.query_row(params, read).optional());
        found.map_err(|error| sql_error(error, doing.to_string()))
    }

    /// Reads all rows of a query's result.
    pub(super) fn all<T>(
        &self,
        sql: &str,
        doing: impl Display,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let query = self.connection.prepare_cached(sql);
        let found = query.and_then(|mut query| query.query_map([], read)?.collect());
        found.map_err(|error| sql_error(error, doing.to_string()))
    }
}

/// Converts an error of SQLite, and sets its kind.
pub(super) fn sql_error(error: rusqlite::Error, what: impl Into<String>) -> Error {
    let extended_code = error.sqlite_error().map(|failure| failure.extended_code);
    let kind = match error.sqlite_error_code() {
        // SQLite returns this code if there is no room for the log's index.
        _ if extended_code == Some(rusqlite::ffi::SQLITE_IOERR_SHMSIZE) => {
            ErrorKind::ResourceExhausted
        }
        Some(ErrorCode::DiskFull) => ErrorKind::ResourceExhausted,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ErrorKind::DataLoss,
        Some(ErrorCode::ReadOnly) => ErrorKind::FailedPrecondition,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    match error {
        // The text of `error` itself contains SQLite's message twice.
        rusqlite::Error::SqliteFailure(failure, Some(said)) => {
            let cause = format!("{said} (SQLite error {})", failure.extended_code);
            Error::caused(kind, what, cause)
        }
        rusqlite::Error::FromSqlConversionFailure(_, _, damage) => {
            Error::caused(ErrorKind::DataLoss, what, damage)
        }
        error => Error::caused(kind, what, error),
    }
}

/// The error for a value that a sound database cannot contain.
pub(super) fn damaged(what: impl Display) -> Error {
    Error::data_loss(format!("the database is damaged: {what}"))
}

/// A number that is stored as SQLite's signed 64-bit integer. A larger number is stored as
/// the maximum. A negative number, which the store never writes, is read as 0.
pub(super) struct Number(pub(super) u64);

impl ToSql for Number {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(saturated(self.0))
    }
}

impl FromSql for Number {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Number> {
        Ok(Number(value.as_i64()?.try_into().unwrap_or(0)))
    }
}

fn saturated(number: u64) -> ToSqlOutput<'static> {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

fn no<T>(number: i64, what: &str) -> FromSqlResult<T> {
    Err(FromSqlError::other(damaged(format!(
        "{number} is not a {what}"
    ))))
}

impl ToSql for SnapshotId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(saturated(self.number()))
    }
}

impl FromSql for SnapshotId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<SnapshotId> {
        let id = value.as_i64()?;
        match u64::try_from(id) {
            Ok(number) if number > 0 => Ok(SnapshotId::new(number)),
            _ => no(id, "snapshot id"),
        }
    }
}

impl ToSql for ProjectId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.number().into())
    }
}

impl FromSql for ProjectId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<ProjectId> {
        let project = value.as_i64()?;
        u32::try_from(project).map_or_else(
            |_| no(project, "project id"),
            |number| Ok(ProjectId::new(number)),
        )
    }
}

impl ToSql for Kind {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(match self {
            Kind::View => 1,
            Kind::Active => 2,
            Kind::Committed => 3,
        }))
    }
}

impl FromSql for Kind {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Kind> {
        match value.as_i64()? {
            1 => Ok(Kind::View),
            2 => Ok(Kind::Active),
            3 => Ok(Kind::Committed),
            other => no(other, "kind of snapshot"),
        }
    }
}

impl ToSql for Volume {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(match self {
            Volume::Image => 0,
            Volume::Writable => 1,
        }))
    }
}

impl FromSql for Volume {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Volume> {
        match value.as_i64()? {
            0 => Ok(Volume::Image),
            1 => Ok(Volume::Writable),
            other => no(other, "volume"),
        }
    }
}

impl ToSql for Timestamp {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.nanos().into())
    }
}

impl FromSql for Timestamp {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Timestamp> {
        value.as_i64().map(Timestamp::from_nanos)
    }
}

/// [`DataBytes::Unknown`] is stored as NULL, and [`DataBytes::WasMounted`] as a
/// negative number.
impl ToSql for DataBytes {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            DataBytes::Counted(bytes) => saturated(*bytes),
            DataBytes::WasMounted => ToSqlOutput::from(-1),
            DataBytes::Unknown => ToSqlOutput::from(Null),
        })
    }
}

impl FromSql for DataBytes {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<DataBytes> {
        Ok(
            match Option::<i64>::column_result(value)?.map(u64::try_from) {
                None => DataBytes::Unknown,
                Some(Ok(bytes)) => DataBytes::Counted(bytes),
                Some(Err(_)) => DataBytes::WasMounted,
            },
        )
    }
}
