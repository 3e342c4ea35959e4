//! The real binary as a child process.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::time::Duration;

use standpipe_lab::program::{Finished, Program};

/// A running `standpipe`; it dereferences to [`Program`].
pub struct Standpipe(Program);

impl Standpipe {
    /// Starts `standpipe <arguments>` with these variables and nothing else in its environment but PATH.
    pub fn start<K: AsRef<str>, V: AsRef<str>>(arguments: &[&str], variables: &[(K, V)]) -> Self {
        Self::start_binary(Path::new(env!("CARGO_BIN_EXE_standpipe")), arguments, variables)
    }

    /// The same with the binary of another release.
    pub fn start_binary<K: AsRef<str>, V: AsRef<str>>(
        binary: &Path,
        arguments: &[&str],
        variables: &[(K, V)],
    ) -> Self {
        Self(Program::start(binary, arguments, variables))
    }

    /// Runs `standpipe <arguments>` to its end, which must be reached within the deadline.
    pub async fn run<K: AsRef<str>, V: AsRef<str>>(
        arguments: &[&str],
        variables: &[(K, V)],
        deadline: Duration,
    ) -> Finished {
        Self::start(arguments, variables).0.finish(deadline).await
    }
}

impl Deref for Standpipe {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.0
    }
}

impl DerefMut for Standpipe {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.0
    }
}
