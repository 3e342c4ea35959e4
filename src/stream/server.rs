//! Information about the server.

use super::{Stream, StreamError, StreamResult};

/// The server's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// In use.
    pub used: u64,
    /// Its limit; 0 for none.
    pub max: u64,
}

impl Memory {
    /// As the reply of INFO says.
    pub(super) fn of(info: &str) -> Self {
        let number = |name| field(info, name).parse().unwrap_or(0);
        Self { used: number("used_memory"), max: number("maxmemory") }
    }
}

/// The value of a field in the reply of INFO; empty if it is not there.
pub(super) fn field<'a>(info: &'a str, name: &str) -> &'a str {
    info.lines()
        .find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')))
        .unwrap_or_default()
        .trim()
}

impl Stream {
    /// How much memory it uses.
    ///
    /// # Errors
    ///
    /// As [`info`].
    pub async fn memory(&mut self) -> StreamResult<Memory> {
        let connection = &mut self.connection;
        let info: String = redis::cmd("INFO").arg("memory").query_async(connection).await?;
        Ok(Memory::of(&info))
    }

    /// The complete reply of INFO.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or the user may not ask.
    pub async fn server_info(&mut self) -> StreamResult<String> {
        let connection = &mut self.connection;
        redis::cmd("INFO").query_async(connection).await
    }

    /// Its clock: seconds and microseconds since 1970.
    ///
    /// # Errors
    ///
    /// As [`info`].
    pub async fn server_time(&mut self) -> StreamResult<(u64, u64)> {
        let connection = &mut self.connection;
        redis::cmd("TIME").query_async(connection).await
    }

    /// A setting's value; `None` if a hosted server lacks the command, or the user may not use it.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn setting(&mut self, name: &str) -> StreamResult<Option<String>> {
        let connection = &mut self.connection;
        match redis::cmd("CONFIG").arg("GET").arg(name).query_async::<Vec<String>>(connection).await {
            Ok(pair) => Ok(pair.into_iter().nth(1)),
            Err(error) if error.is_io_error() => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// The name of our user.
    ///
    /// # Errors
    ///
    /// As [`info`].
    pub async fn who_am_i(&mut self) -> StreamResult<String> {
        let connection = &mut self.connection;
        redis::cmd("ACL").arg("WHOAMI").query_async(connection).await
    }
}

/// Whether the server refused the user or the password.
#[must_use]
pub fn refused_login(error: &StreamError) -> bool {
    matches!(error.kind(), redis::ErrorKind::AuthenticationFailed)
}
