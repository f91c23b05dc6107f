//! A link that loses, repeats and reorders frames, which ours does not: no byte is lost or invented for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::thread;

use cubby_network::NetworkPolicy;
use guest::{Faults, Guest, config, host, pattern};
use proptest::prelude::*;

/// Out of a hundred frames this many are lost, sent twice, or come after the next one.
fn faults(seed: u64, lost: u64, twice: u64, late: u64) -> Faults {
    let mut state = seed | 1;
    let mut held: Option<Vec<u8>> = None;
    Box::new(move |frame, out: &mut VecDeque<Vec<u8>>| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let draw = state % 100;
        if draw < lost {
        } else if draw < lost + twice {
            out.push_back(frame.clone());
            out.push_back(frame);
        } else if draw < lost + twice + late && held.is_none() {
            held = Some(frame);
            return;
        } else {
            out.push_back(frame);
        }
        out.extend(held.take());
    })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 0, ..ProptestConfig::with_cases(6) })]

    #[test]
    fn no_byte_is_lost_or_invented(seed: u64, lost in 0u64..8, twice in 0u64..15, late in 0u64..15) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let writer = stream.try_clone().unwrap();
            let writer = thread::spawn(move || {
                (&writer).write_all(&pattern(150_000)).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let mut heard = Vec::new();
            (&stream).read_to_end(&mut heard).unwrap();
            writer.join().unwrap();
            heard
        });
        let mut guest = Guest::new(config(NetworkPolicy::all()));
        guest.hurry = true;
        guest.outbound = faults(seed, lost, twice, late);
        guest.inbound = faults(!seed, lost, twice, late);
        let socket = guest.connect(host(port));
        let heard = guest.exchange(socket, &pattern(200_000));
        prop_assert!(heard == pattern(150_000));
        guest.until("the server has ended", |_| server.is_finished());
        prop_assert!(server.join().unwrap() == pattern(200_000));
    }
}
