//! Information about the server.

use super::{Stream, StreamError, StreamResult};

impl Stream {
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
