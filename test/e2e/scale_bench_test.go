package e2e_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// A million flows are datagrams of one pod, each to another remote. The first half is
// not answered and ends; the others live, some of them only because they go on.
const (
	scaleFlows   = 1_000_000
	scaleEnding  = scaleFlows / 2
	scaleGoingOn = 10_000
	scaleTimer   = 90 * time.Second // of what is not answered
)

// scale is a node with an agent and a million flows, which the attached programs made of
// packets that they were shown.
type scale struct {
	*node
	egress, ingress *ebpf.Program
	index           int       // of eth0
	filled          time.Time // no packet of a flow that ends was later
	complete        time.Time // no flow began later
}

// newEmptyScale has no flow yet.
func newEmptyScale(b *testing.B, args ...string) *scale {
	b.Helper()
	args = append(args, fmt.Sprintf("--bpf-nat-global-max=%d", 2*scaleFlows),
		"--nat-timeout-udp="+scaleTimer.String(), "--nat-timeout-udp-stream=1h", "--log-level=debug", "--log-format=json",
		"--max-new-flows-per-pod=0") // one pod makes them, as fast as it can
	return &scale{node: startNode(b, lab.Options{}, args...)}
}

func newScale(b *testing.B) *scale {
	b.Helper()
	s := newEmptyScale(b)
	s.fill(b)
	return s
}

// fill makes the flows.
func (s *scale) fill(b *testing.B) {
	b.Helper()
	var err error
	s.index, err = s.Node.Index("eth0")
	must(b, err)
	s.egress, s.ingress = s.attached("egress"), s.attached("ingress")
	for i := range scaleFlows {
		if i == scaleEnding {
			s.filled = time.Now()
		}
		p := scalePacket(s.node, i)
		out := s.show(s.egress, p)
		if i >= scaleEnding+scaleGoingOn {
			s.show(s.ingress, p.From(s.NodeAddr.V4, binary.BigEndian.Uint16(out[34:])).Reply())
		}
	}
	s.complete = time.Now()
}

// attached is the program of a tcx link of eth0.
func (s *scale) attached(direction string) *ebpf.Program {
	s.t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(s.bpfRoot, fmt.Sprintf("%s_%d", direction, s.index)), nil)
	must(s.t, err)
	defer l.Close()
	info, err := l.Info()
	must(s.t, err)
	prog, err := ebpf.NewProgramFromID(info.Program)
	must(s.t, err)
	s.t.Cleanup(func() { prog.Close() })
	return prog
}

func scalePacket(n *node, i int) packet.Packet {
	var remote [4]byte
	binary.BigEndian.PutUint32(remote[:], 1<<24+uint32(i))
	return packet.Packet{Src: n.PodAddrs[0].V4, SrcPort: 40000, Dst: netip.AddrFrom4(remote), DstPort: 4000, Proto: packet.UDP,
		Payload: make([]byte, 8)}
}

// show runs a program on a packet of eth0, and returns what became of that.
func (s *scale) show(prog *ebpf.Program, p packet.Packet) []byte {
	frame := p.Build()
	context := struct { // struct __sk_buff
		_       [10]uint32
		Ifindex uint32
		_       [37]uint32
	}{Ifindex: uint32(s.index)}
	opt := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64), Context: context}
	if _, err := prog.Run(&opt); err != nil {
		s.t.Errorf("%+v: %v", p, err)
		return frame
	}
	return opt.DataOut
}

// swept is what the agent's log says of a sweep.
type swept struct {
	Msg     string
	Time    time.Time // of its end
	Expired int
	Took    time.Duration
}

func (s *scale) sweeps() (all []swept) {
	for line := range strings.Lines(s.log.String()) {
		var one swept
		if json.Unmarshal([]byte(line), &one) == nil && one.Msg == "swept" {
			all = append(all, one)
		}
	}
	return all
}

// cpu is what the agent has used.
func (s *scale) cpu() time.Duration {
	s.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.agent.cmd.Process.Pid))
	must(s.t, err)
	_, behind, _ := strings.Cut(string(stat), ") ") // the name
	fields := strings.Fields(behind)
	user, err := strconv.Atoi(fields[11])
	must(s.t, err)
	system, err := strconv.Atoi(fields[12])
	must(s.t, err)
	return time.Duration(user+system) * time.Second / 100
}

// BenchmarkScale gives what an agent with a million flows costs in a minute, and how
// long what is past its timer stays: at most until the second sweep that begins then has
// ended. All of it must go by then, and nothing else.
func BenchmarkScale(b *testing.B) {
	for b.Loop() {
		s := newScale(b)
		stop := s.goOn()
		cpu, begin := s.cpu(), time.Now()
		time.Sleep(time.Minute)
		b.ReportMetric((s.cpu()-cpu).Seconds()/time.Since(begin).Minutes(), "cpu-s/min")
		due := s.filled.Add(scaleTimer + 2*time.Second) // stamps are whole seconds
		labtest.Eventually(b, 3*time.Minute, func() error {
			if n := s.begun(due); n < 2 {
				return fmt.Errorf("%d sweeps", n)
			}
			return nil
		})
		stop()
		var period, gone time.Duration
		before := begin
		for _, one := range s.sweeps() {
			if one.Expired > 0 {
				gone = one.Time.Sub(due)
			}
			if one.Time.After(begin) {
				period = max(period, one.Time.Sub(before))
			}
			before = one.Time
		}
		b.ReportMetric(period.Seconds(), "longest-period-s")
		b.ReportMetric(gone.Seconds(), "gone-after-s")
		s.checkLiving()
	}
}

// begun is the number of sweeps that began after a time and have ended.
func (s *scale) begun(after time.Time) (n int) {
	for _, one := range s.sweeps() {
		if one.Time.Add(-one.Took).After(after) {
			n++
		}
	}
	return n
}

// goOn sends a packet of each flow that goes on three times within its timer, until stop.
func (s *scale) goOn() (stop func()) {
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		pause := time.NewTicker(scaleTimer / 3)
		defer pause.Stop()
		for {
			for i := range scaleGoingOn {
				s.show(s.egress, scalePacket(s.node, scaleEnding+i))
			}
			select {
			case <-pause.C:
			case <-done:
				return
			}
		}
	}()
	return func() {
		close(done)
		<-stopped
	}
}

// checkLiving compares the mappings with those that should live: a flow that had been
// ended and began again would be younger than all of them.
func (s *scale) checkLiving() {
	s.t.Helper()
	youngest := time.Since(s.complete) - 2*time.Second
	in, err := datapath.Inspect(s.bpfRoot)
	must(s.t, err)
	defer in.Close()
	all, err := in.Mappings(datapath.Filter{})
	must(s.t, err)
	living, ended, young := 0, 0, 0
	for _, m := range all {
		remote := m.Dst.Addr().As4()
		switch {
		case !m.Out:
		case binary.BigEndian.Uint32(remote[:])-1<<24 < scaleEnding:
			ended++
		case m.Age < youngest:
			young++
		default:
			living++
		}
	}
	if living != scaleFlows-scaleEnding || ended+young > 0 {
		s.t.Errorf("%d flows live, want %d; %d began anew, %d should have ended", living, scaleFlows-scaleEnding, young, ended)
	}
}

// BenchmarkScaleList gives the time of a list of a million flows.
func BenchmarkScaleList(b *testing.B) {
	s := newScale(b)
	for _, form := range []string{"text", "json"} {
		b.Run(form, func(b *testing.B) {
			var cpu time.Duration
			for b.Loop() {
				cmd := exec.Command(s.bin, "bpf", "nat", "list", "-o", form, "--bpf-root", s.bpfRoot, "--run-dir", s.runDir)
				must(b, s.Node.Start(cmd))
				must(b, cmd.Wait())
				cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			}
			b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
		})
	}
}

// BenchmarkScaleScrape gives what a scrape costs without a flow and with a million, between two
// sweeps.
func BenchmarkScaleScrape(b *testing.B) {
	s := newEmptyScale(b, httpOption)
	measure := func(b *testing.B) {
		const times = 200
		for b.Loop() {
			start := time.Now()
			labtest.Eventually(b, 2*time.Minute, func() error {
				if s.begun(start) == 0 {
					return fmt.Errorf("no sweep after %v", time.Since(start))
				}
				return nil
			})
			b.ReportMetric(s.scrape()[`nat_flows{family="ipv4",proto="udp"}`], "flows")
			cpu, begin := s.cpu(), time.Now()
			for range times {
				s.scrape()
			}
			b.ReportMetric(float64(time.Since(begin).Microseconds())/1000/times, "ms/scrape")
			b.ReportMetric(float64((s.cpu()-cpu).Microseconds())/1000/times, "cpu-ms/scrape")
		}
	}
	b.Run("empty", measure)
	s.fill(b)
	b.Run("million", measure)
}
