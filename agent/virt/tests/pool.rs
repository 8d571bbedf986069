//! The call pool: deadlines, order, stuck calls. A hanging monitor is the simulator's `CallsHang`, released at the end.

// helpers of tests may panic like the tests
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, unbounded};
use muster_common::clock::SystemClock;
use muster_common::id::VmId;
use muster_common::units::ByteLen;
use muster_virt::simulator::{Fault, Simulator, SimulatorConfig};
use muster_virt::{Accel, Boot, DomainSpec, Hypervisor, HypervisorErrorKind, Lane, Pool, PoolConfig};

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(30);

struct Rig {
    simulator: Arc<Simulator>,
    pool: Pool,
    vms: Vec<VmId>,
}

fn rig(config: PoolConfig, vms: usize) -> Rig {
    let simulator = Arc::new(Simulator::new(SimulatorConfig::new(1, Arc::new(SystemClock))));
    let vms: Vec<_> = (0..vms).map(|_| VmId::random()).collect();
    for (number, vm) in vms.iter().enumerate() {
        let boot = Boot::Direct { kernel: "/k".into(), initrd: None, cmdline: String::new() };
        let spec = DomainSpec::new(*vm, format!("vm{number}"), ByteLen::mib(64), boot, Accel::Tcg);
        simulator.define(&spec).unwrap();
    }
    let pool = Pool::start(simulator.clone(), config).unwrap();
    Rig { simulator, pool, vms }
}

impl Rig {
    /// Makes one call for the VM hang past its deadline. On a loaded machine a call may not even start before it: again.
    fn stick(&self, vm: VmId) {
        self.simulator.inject(vm, Fault::CallsHang).unwrap();
        loop {
            let result = self.pool.call(Lane::Vm(vm), "start", SHORT, move |hv| hv.start(vm)).recv().unwrap();
            match result.unwrap_err().kind() {
                HypervisorErrorKind::Unknown => return,
                kind => assert_eq!(kind, HypervisorErrorKind::Busy),
            }
        }
    }
}

fn two_threads() -> PoolConfig {
    PoolConfig { threads: 2, threads_max: 8, queue: 64 }
}

#[test]
fn a_call_returns_its_result_or_its_error() {
    let rig = rig(two_threads(), 1);
    let vm = rig.vms[0];
    let call = |what| rig.pool.call(Lane::Vm(vm), what, LONG, move |hv| hv.start(vm));
    call("start").recv().unwrap().unwrap();
    assert_eq!(call("start").recv().unwrap().unwrap_err().kind(), HypervisorErrorKind::InvalidState);
    assert_eq!(rig.pool.close(LONG), 0);
    assert_eq!(call("start").recv().unwrap().unwrap_err().kind(), HypervisorErrorKind::Busy);
}

#[test]
fn a_stuck_call_is_unknown_at_its_deadline_and_its_later_calls_are_busy_and_power_off_passes() {
    let rig = rig(two_threads(), 1);
    let vm = rig.vms[0];
    rig.simulator.start(vm).unwrap();
    rig.stick(vm);
    let behind = rig.pool.call(Lane::Vm(vm), "reset", SHORT, move |hv| hv.reset(vm));
    assert_eq!(behind.recv().unwrap().unwrap_err().kind(), HypervisorErrorKind::Busy);
    assert_eq!(rig.pool.stuck(), 1);
    rig.pool.call(Lane::Urgent, "power off", LONG, move |hv| hv.power_off(vm)).recv().unwrap().unwrap();
    rig.simulator.clear(vm, Fault::CallsHang).unwrap();
    assert_eq!(rig.pool.close(LONG), 0);
    assert_eq!(rig.pool.stuck(), 0);
}

#[test]
fn more_stuck_vms_than_threads_do_not_stop_the_others() {
    let rig = rig(two_threads(), 6);
    for vm in &rig.vms[..5] {
        rig.stick(*vm);
    }
    let vm = rig.vms[5];
    rig.pool.call(Lane::Vm(vm), "start", LONG, move |hv| hv.start(vm)).recv().unwrap().unwrap();
    let rows = rig.pool.call(Lane::Host, "list", LONG, |hv| hv.list()).recv().unwrap().unwrap();
    assert_eq!(rows.len(), 6);
    for vm in &rig.vms[..5] {
        rig.simulator.clear(*vm, Fault::CallsHang).unwrap();
    }
    assert_eq!(rig.pool.close(LONG), 0);
}

#[test]
fn at_the_ceiling_of_stuck_threads_new_calls_are_busy_not_lost() {
    let rig = rig(PoolConfig { threads: 1, threads_max: 2, queue: 64 }, 3);
    rig.stick(rig.vms[0]);
    rig.stick(rig.vms[1]);
    let vm = rig.vms[2];
    let refused = rig.pool.call(Lane::Vm(vm), "start", SHORT, move |hv| hv.start(vm));
    assert_eq!(refused.recv().unwrap().unwrap_err().kind(), HypervisorErrorKind::Busy);
    assert_eq!(rig.pool.close(SHORT), 2, "they are still running");
    for vm in &rig.vms[..2] {
        rig.simulator.clear(*vm, Fault::CallsHang).unwrap();
    }
}

#[test]
fn calls_of_one_vm_keep_their_order_and_never_overlap_while_vms_run_beside_each_other() {
    let rig = rig(PoolConfig { threads: 4, threads_max: 4, queue: 1024 }, 2);
    let (log, seen) = unbounded();
    let (gate, open) = bounded::<()>(0);
    let first = rig.vms[0];
    let blocked = rig.pool.call(Lane::Vm(first), "hold", LONG, move |_| {
        open.recv().unwrap();
        Ok(())
    });
    for number in 0..100 {
        let log = log.clone();
        rig.pool.submit(
            Lane::Vm(first),
            "count",
            LONG,
            move |_| Ok(number),
            move |result| {
                log.send(result.unwrap()).unwrap();
            },
        );
    }
    // the other VM is served while the first is held
    rig.pool.call(Lane::Vm(rig.vms[1]), "beside", LONG, |_| Ok(())).recv().unwrap().unwrap();
    assert!(seen.is_empty());
    gate.send(()).unwrap();
    blocked.recv().unwrap().unwrap();
    let order: Vec<i32> = (0..100).map(|_| seen.recv_timeout(LONG).unwrap()).collect();
    assert!(order.is_sorted(), "{order:?}");
}

#[test]
fn a_full_queue_refuses_at_once() {
    let rig = rig(PoolConfig { threads: 1, threads_max: 1, queue: 1 }, 1);
    let (gate, open) = bounded::<()>(0);
    let (entered, inside) = bounded::<()>(1);
    let running = rig.pool.call(Lane::Host, "hold", LONG, move |_| {
        entered.send(()).unwrap();
        open.recv().unwrap();
        Ok(())
    });
    inside.recv().unwrap();
    let waiting = rig.pool.call(Lane::Host, "wait", LONG, |_| Ok(()));
    let began = Instant::now();
    let refused = rig.pool.call(Lane::Host, "refused", LONG, |_| Ok(())).recv().unwrap();
    assert_eq!(refused.unwrap_err().kind(), HypervisorErrorKind::Busy);
    assert!(began.elapsed() < LONG);
    gate.send(()).unwrap();
    running.recv().unwrap().unwrap();
    waiting.recv().unwrap().unwrap();
}

#[test]
fn a_panicking_call_is_an_error_and_the_thread_goes_on() {
    let rig = rig(PoolConfig { threads: 1, threads_max: 1, queue: 8 }, 1);
    let bad = rig.pool.call(Lane::Host, "bad", LONG, |_| -> muster_virt::Result<()> { panic!("on purpose") });
    assert_eq!(bad.recv().unwrap().unwrap_err().kind(), HypervisorErrorKind::Other);
    rig.pool.call(Lane::Host, "good", LONG, |_| Ok(())).recv().unwrap().unwrap();
}
