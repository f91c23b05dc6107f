//! `cubby-traffic run ADDRESS`: what a guest does for its host, which listens there, until that hangs up.
//! `cubby-traffic serve PORT`: a guest that answers streams ([`cubby_traffic::exchange`]); says `serves` when it does.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used)]

use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::thread;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["run", address] => {
            let address = address.parse().expect("an address with a port");
            match cubby_traffic::attend(address) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&format!("{address}: {error}")),
            }
        }
        ["serve", port] => serve(port.parse().expect("a port")),
        _ => fail("usage: cubby-traffic run ADDRESS:PORT | serve PORT"),
    }
}

fn fail(what: &str) -> ExitCode {
    eprintln!("cubby-traffic: {what}");
    ExitCode::FAILURE
}

/// Answers streams until one is not what it should be.
fn serve(port: u16) -> ExitCode {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a free port");
    println!("serves");
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return fail(&format!("accept: {error}")),
        };
        thread::spawn(move || {
            if let Err(error) = cubby_traffic::exchange::answer(&stream) {
                fail(&error.to_string());
                std::process::exit(1);
            }
        });
    }
    ExitCode::SUCCESS
}
