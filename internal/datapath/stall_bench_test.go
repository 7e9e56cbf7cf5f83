package datapath

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

const (
	stallFlows = 1_000_000 // of them half are past their timer
	stallTable = 1 << 20
)

// Phases of BenchmarkStall.
const (
	stallPhase  = 2 * time.Second
	stallPeriod = 250 * time.Microsecond // of the echoes
	stallGiveUp = time.Second            // after that an echo is lost
)

// stallCPU sends, forwards and sweeps.
var stallCPU = runtime.NumCPU() - 1

// stallEnv makes BenchmarkStall the process that sends: descriptor 3 is a socket of the
// pod, 4 one of the world.
const stallEnv = "BAUTA_TEST_STALL"

// echoes are the times that echoes took in a phase, ascending, and what the hypervisor
// took from all CPUs meanwhile.
type echoes struct {
	Times []time.Duration
	Lost  int
	Steal time.Duration
}

func (e echoes) quantile(q float64) time.Duration {
	return e.Times[min(int(q*float64(len(e.Times))), len(e.Times)-1)]
}

// BenchmarkStall gives the times of echoes that cross the node while a million flows are
// swept without a pause, and while they are not, in turn. Half of the flows are due in
// the first sweep of a phase. Of the phases it gives the median; of the longest echo of
// a phase also the least, because a stall that sweeps make is in all of them, and one of
// the machine's in some.
//
// All is on one CPU, so that packets find in their way what the sweeper does in the
// kernel. The sender, which is also the world, is a process of its own with real-time
// priority, all its memory locked and no garbage collection: it waits for nothing but a
// kernel that does not let go of the CPU, and soft interrupts. The time of an echo begins
// when it is due.
func BenchmarkStall(b *testing.B) {
	if os.Getenv(stallEnv) != "" {
		if err := sendEchoes(); err != nil {
			b.Fatal(err)
		}
		return
	}
	topo := labtest.NewNode(b, lab.Options{})
	d := newBench(b, topo.Node, Options{DefaultFlows: stallTable})
	d.apply(nodePolicy(b, topo))
	phase := startSender(b, topo)
	var phases [2][]echoes // without, and with sweeps
	sweeps, expired := 0, 0
	for b.Loop() {
		for kind := range phases {
			d.fill(stallFlows, stallFlows/2, topo.NodeAddr.V4, 1000)
			d.onCPU(stallCPU, func() {
				result := phase()
				for begin := time.Now(); kind == 1 && time.Since(begin) < stallPhase; sweeps++ {
					s, err := d.Sweep(context.Background())
					if err != nil {
						b.Error(err)
					}
					expired += s.Expired
				}
				phases[kind] = append(phases[kind], <-result)
			})
		}
	}
	if want := b.N * stallFlows / 2; expired < want {
		b.Errorf("%d flows expired, want %d", expired, want)
	}
	for kind, name := range []string{"quiet", "sweeping"} {
		for i, e := range phases[kind] {
			b.Logf("%s %d: %d echoes, %d lost, p99 %v, p99.9 %v, p99.99 %v, longest %v; stolen %v", name, i+1, len(e.Times), e.Lost,
				e.quantile(.99), e.quantile(.999), e.quantile(.9999), e.quantile(1), e.Steal)
		}
		for unit, q := range map[string]float64{"p50": .5, "p99": .99, "p99.9": .999, "p99.99": .9999, "longest": 1} {
			var all []time.Duration
			for _, e := range phases[kind] {
				all = append(all, e.quantile(q))
			}
			slices.Sort(all)
			b.ReportMetric(microseconds(all[len(all)/2]), name+"-"+unit+"-us")
			if q == 1 {
				b.ReportMetric(microseconds(all[0]), name+"-least-longest-us")
			}
		}
	}
	b.ReportMetric(float64(sweeps)/float64(b.N), "sweeps/phase")
	b.ReportMetric(0, "ns/op")
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// onCPU runs f on one CPU, in the namespace of the data plane.
func (b *bench) onCPU(cpu int, f func()) {
	b.t.Helper()
	err := b.ns.Do(func() error {
		var before, one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedGetaffinity(0, &before); err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		f()
		return unix.SchedSetaffinity(0, &before)
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// startSender starts the process that sends. The function that it returns starts a
// phase.
func startSender(b *testing.B, topo *lab.Topology) func() <-chan echoes {
	b.Helper()
	l, err := lab.ListenUDP(topo.World, netip.AddrPortFrom(topo.WorldAddr.V4, 0))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	server := l.LocalAddr().(*net.UDPAddr).AddrPort()
	pod, err := lab.DialUDP(within(b, time.Second), topo.Pods[0], netip.AddrPort{}, server)
	if err != nil {
		b.Fatal(err)
	}
	defer pod.Close()
	if _, err := pod.Write([]byte{0}); err != nil {
		b.Fatal(err)
	}
	l.SetDeadline(time.Now().Add(stallGiveUp))
	_, client, err := l.ReadFromUDPAddrPort(nil)
	if err != nil {
		b.Fatal(err)
	}
	l.Close()
	world, err := lab.DialUDP(within(b, time.Second), topo.World, server, client)
	if err != nil {
		b.Fatal(err)
	}
	defer world.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^$", "-test.bench=^BenchmarkStall$", "-test.benchtime=1x")
	cmd.Env = append(os.Environ(), stallEnv+"=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1")
	for _, c := range []interface{ File() (*os.File, error) }{pod, world} {
		f, err := c.File()
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	orders, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	var log strings.Builder
	cmd.Stdout = &log
	results, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		orders.Close() // its end
		if err := cmd.Wait(); err != nil {
			b.Errorf("the sender: %v\n%s", err, log.String())
		}
	})
	from := json.NewDecoder(results)
	return func() <-chan echoes {
		done := make(chan echoes, 1)
		if _, err := orders.Write([]byte{0}); err != nil {
			b.Fatal(err)
		}
		go func() {
			var e echoes
			if err := from.Decode(&e); err != nil || len(e.Times) == 0 {
				b.Errorf("the sender: %v: %d echoes", err, len(e.Times))
				e.Times = []time.Duration{0}
			}
			done <- e
		}()
		return done
	}
}

// sendEchoes sends a phase of echoes for each byte of standard input, and writes their
// times to standard error, which is not the testing package's.
func sendEchoes() error {
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	var cpus unix.CPUSet
	cpus.Set(stallCPU)
	if err := unix.SchedSetaffinity(0, &cpus); err != nil {
		return err
	}
	for _, fd := range []int{3, 4} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE); err != nil {
		return err
	}
	fifo := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 50}
	if err := unix.SchedSetAttr(0, &fifo, 0); err != nil {
		return err
	}
	to := json.NewEncoder(os.Stderr)
	times := make([]time.Duration, 0, 2*stallPhase/stallPeriod)
	for order := make([]byte, 1); ; {
		if n, _ := os.Stdin.Read(order); n == 0 {
			return nil
		}
		result, err := sendPhase(times[:0])
		if err != nil {
			return err
		}
		if err := to.Encode(result); err != nil {
			return err
		}
	}
}

// sendPhase sends an echo each period. Those that came due while one was awaited count
// as if they had been sent in time, and had come back with it.
func sendPhase(times []time.Duration) (e echoes, err error) {
	stolen, err := stealTime()
	if err != nil {
		return e, err
	}
	begin := time.Now()
	for due := stallPeriod; due < stallPhase; due += stallPeriod {
		for time.Since(begin) < due {
			rest := unix.NsecToTimespec(int64(due - time.Since(begin)))
			unix.Nanosleep(&rest, nil)
		}
		ok, err := sendEcho(uint64(due))
		if err != nil {
			return e, err
		}
		if !ok {
			e.Lost++
		}
		back := time.Since(begin)
		times = append(times, back-due)
		for due+stallPeriod < back {
			due += stallPeriod
			times = append(times, back-due)
		}
	}
	now, err := stealTime()
	slices.Sort(times)
	e.Times, e.Steal = times, now-stolen
	return e, err
}

// sendEcho sends a number to the world and back.
func sendEcho(number uint64) (ok bool, err error) {
	const pod, world = 3, 4
	var buf [8]byte
	begin := time.Now()
	for _, way := range [2]struct{ from, to int }{{pod, world}, {world, pod}} {
		binary.NativeEndian.PutUint64(buf[:], number)
		if _, err := unix.Write(way.from, buf[:]); err != nil {
			return false, fmt.Errorf("send: %w", err)
		}
		for got := ^number; got != number; got = binary.NativeEndian.Uint64(buf[:]) {
			_, err := unix.Read(way.to, buf[:])
			if err == unix.EAGAIN {
				clear(buf[:])
				if time.Since(begin) > stallGiveUp {
					return false, nil
				}
			} else if err != nil {
				return false, fmt.Errorf("receive: %w", err)
			}
		}
	}
	return true, nil
}

// stealTime is how long all CPUs together stood still for other machines.
func stealTime() (time.Duration, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat)) // cpu user nice system idle iowait irq softirq steal
	ticks, err := strconv.Atoi(fields[8])
	return time.Duration(ticks) * time.Second / 100, err
}

// BenchmarkHold gives the longest time for which one system call of a sweep keeps a CPU:
// a batch read from a full table and from an empty one, a full run of the reaper. Each
// call is made b.N times on the same entries, and its shortest time counts: the rest is
// the machine's.
func BenchmarkHold(b *testing.B) {
	d := newBench(b, labtest.NewNS(b), Options{DefaultFlows: stallTable})
	in := loopPolicy(ports(32768, 32768))
	d.apply(in)
	var full, empty, reap []time.Duration
	for b.Loop() {
		d.fill(stallFlows, stallFlows/2, in.Devices[0].IPv4, 1000)
		d.onCPU(stallCPU, func() {
			full = shortest(full, holds(b, batches[masqTuple4, masqFlow4](d.objs.Forward4)))
			empty = shortest(empty, holds(b, batches[masqTuple, masqFlow6](d.objs.Forward6)))
			reap = shortest(reap, d.holdsOfReaper())
		})
	}
	for name, all := range map[string][]time.Duration{"batch": full, "batch-empty": empty, "reap": reap} {
		slices.Sort(all)
		b.ReportMetric(microseconds(all[len(all)-1]), name+"-longest-us")
		b.ReportMetric(microseconds(all[len(all)/2]), name+"-p50-us")
	}
	b.ReportMetric(0, "ns/op")
}

// shortest takes the times of the same calls together.
func shortest(a, b []time.Duration) []time.Duration {
	for i := range a {
		b[i] = min(a[i], b[i])
	}
	return b
}

// holds are the times of the calls that read a table.
func holds[K, V any](b *testing.B, all iter.Seq2[chunk[K, V], error]) (times []time.Duration) {
	before := time.Now()
	for _, err := range all {
		if err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(before))
		before = time.Now()
	}
	return times
}

// holdsOfReaper are the times of runs that end full batches of the flows that are due.
func (b *bench) holdsOfReaper() (times []time.Duration) {
	b.t.Helper()
	r := reaper{prog: b.objs.Reap}
	for i := range stallFlows / 2 {
		before := time.Now()
		if err := r.add(context.Background(), masqReapRecord{Key: key4(filled(i)).tuple(), Table: reapForward, Percent: 100}); err != nil {
			b.t.Fatal(err)
		}
		if len(r.data) == reapStart {
			times = append(times, time.Since(before))
		}
	}
	if r.removed != len(times)*reapBatch {
		b.t.Errorf("%d flows ended, want %d", r.removed, len(times)*reapBatch)
	}
	return times
}
