//! The `cubby` command, as a binary of this package: cargo builds it with the tests that run it.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    cubby_cli::main()
}
