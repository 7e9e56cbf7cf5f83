package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
)

// bench is a loop with a fake kernel, in a bubble with a clock of its own.
type bench struct {
	*loop
	kernel *fakeKernel
	reload chan struct{}
	list   string // path of the ip-masq-agent file

	mu      sync.Mutex
	network devices.Snapshot
	netErr  error
}

// set changes the world that the loop reads.
func (b *bench) set(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

func newBench(t *testing.T, options ...string) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{
		kernel:  &fakeKernel{started: time.Now()},
		network: device(devices.Snapshot{}, 2, "eth0", "192.0.2.1/24"),
		reload:  make(chan struct{}),
		list:    filepath.Join(dir, "list"),
	}
	cfg := load(t, append(options, "pod-cidrs=10.1.0.0/16", "ip-masq-agent-config-path="+b.list)...)
	b.loop = newLoop(cfg, Options{Reload: b.reload, Version: "test"}, dir, quiet)
	b.loop.kernel, b.loop.flows = b.kernel, b.kernel
	b.readNetwork = func() (devices.Snapshot, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.network, b.netErr
	}
	b.readReserved = func() ([]config.PortRange, error) { return nil, nil }
	return b
}

// run runs the loop while play goes on, and returns what the kernel was told.
func (b *bench) run(t *testing.T, play func()) string {
	t.Helper()
	b.announce()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- b.loop.run(ctx) }()
	synctest.Wait()
	play()
	synctest.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return strings.Join(b.kernel.lines, "\n")
}

// after lets time pass, then all that is due happen.
func after(d time.Duration) {
	time.Sleep(d) // of the bubble's clock: no waiting
	synctest.Wait()
}

func check(t *testing.T, got, want string) {
	t.Helper()
	want = strings.ReplaceAll(strings.Trim(want, "\n\t"), "\t", "")
	if got != want {
		t.Errorf("%s\nwant:\n%s", got, want)
	}
}

func TestLoopFollowsChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ip-masq-agent=true")
		write(t, b.list, goodList)
		got := b.run(t, func() {
			after(time.Second)
			b.signals.network.put() // nothing has changed
			after(time.Second)
			write(t, b.list, strings.ReplaceAll(goodList, "10.0.0.0/8", "10.0.0.0/9"))
			b.signals.ipMasq.put()
			after(10 * time.Millisecond)
			for i := range 5 {
				b.set(func() { b.network = device(b.network, 3+i, fmt.Sprintf("eth%d", 1+i), "198.51.100.1/24") })
			}
			for range 5 { // much news is one
				b.signals.network.put()
			}
			after(time.Second)
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0
			 2.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/9] nodes=0
			 2.01s apply devices=[eth0 192.0.2.1 eth1 198.51.100.1 eth2 198.51.100.1 eth3 198.51.100.1 eth4 198.51.100.1 eth5 198.51.100.1] nonmasq=[10.0.0.0/9] nodes=0`)
	})
}

func TestLoopRetriesAndSweeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.kernel.set(errors.New("no memory"))
		got := b.run(t, func() {
			if s, _ := b.published.Load().status(time.Now(), nil); s.Agent.Ready || s.Agent.Error != "no memory" {
				t.Errorf("%+v", s.Agent)
			}
			after(2 * time.Second)
			b.kernel.set(nil)
			after(2 * time.Second)
			if s, _ := b.published.Load().status(time.Now(), nil); !s.Agent.Ready || s.Agent.Error != "" {
				t.Errorf("%+v", s.Agent)
			}
			after(2 * time.Second) // 6 s
			b.set(func() { b.network = device(devices.Snapshot{}, 2, "eth0", "192.0.2.7/24") })
			b.signals.network.put()
			after(time.Second)
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0: no memory
			 0.25s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0: no memory
			 0.75s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0: no memory
			 1.75s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0: no memory
			 3.75s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0
			 5.00s sweep
			 6.00s apply devices=[eth0 192.0.2.7] nonmasq=[] nodes=0
			 6.00s sweep`)
	})
}

func TestLoopHealsWithoutNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		got := b.run(t, func() { after(61 * time.Second) })
		var applies []string
		for _, line := range strings.Split(got, "\n") {
			if strings.Contains(line, "apply") {
				applies = append(applies, strings.Fields(line)[0])
			}
		}
		check(t, strings.Join(applies, " "), "0.00s 30.00s 60.00s")
	})
}

func TestLoopSurvivesAnUnreadableNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.netErr = errors.New("netlink: interrupted")
		got := b.run(t, func() {
			after(100 * time.Millisecond)
			b.set(func() { b.netErr = nil })
			after(time.Second)
		})
		check(t, got, " 0.25s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0")
	})
}

// What is detached behind the agent's back is attached again within a second, also
// without news.
func TestLoopAttachesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		got := b.run(t, func() {
			after(1100 * time.Millisecond)
			b.kernel.change(func([]datapath.Attachment) []datapath.Attachment { return nil })
			after(time.Second)
			b.kernel.change(func(a []datapath.Attachment) []datapath.Attachment { a[0].Draining = true; return a })
			b.signals.network.put() // as a removed qdisc makes
			after(time.Second)
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0
			 1.50s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0
			 2.10s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0`)
	})
}

// With one device that can't be attached the policy is in force: the agent is
// ready, says what is wrong, writes policy.json, ends mappings, and goes on trying.
func TestLoopWithADeviceThatCannotBeAttached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.network = device(b.network, 3, "bad0", "198.51.100.1/24")
		got := b.run(t, func() {
			s, _ := b.published.Load().status(time.Now(), fakeInspector{applied: true, attached: b.kernel.Attached()})
			want := "device not attached: bad0; device bad0 is not attached"
			if got := strings.Join(s.Degraded(), "; "); got != want || !s.Agent.Ready || s.Agent.Error != "" {
				t.Errorf("degraded: %s\nwant %s\n%+v", got, want, s.Agent)
			}
			if f, err := ReadPolicyFile(b.runDir); err != nil || len(f.Devices) != 2 {
				t.Errorf("policy.json: %+v %v", f.Devices, err)
			}
			after(2 * time.Second)
			b.set(func() {
				b.network = device(device(devices.Snapshot{}, 2, "eth0", "192.0.2.7/24"), 3, "bad0", "198.51.100.1/24")
			})
			b.signals.network.put()
			after(10 * time.Millisecond)
			if f, err := ReadPolicyFile(b.runDir); err != nil || f.Devices[1].IPv4.String() != "192.0.2.7" {
				t.Errorf("policy.json: %+v %v", f.Devices, err)
			}
			b.set(func() { b.network.Links[1].Name = "good0" })
			b.signals.network.put()
			after(10 * time.Millisecond)
			if s, _ := b.published.Load().status(time.Now(), fakeInspector{attached: b.kernel.Attached()}); len(s.Degraded()) > 0 || !s.Agent.Ready {
				t.Errorf("attached at last: %v", s.Degraded())
			}
		})
		check(t, got, `
			 0.00s apply devices=[bad0 198.51.100.1 eth0 192.0.2.1] nonmasq=[] nodes=0: device not attached: bad0
			 0.25s apply devices=[bad0 198.51.100.1 eth0 192.0.2.1] nonmasq=[] nodes=0: device not attached: bad0
			 0.75s apply devices=[bad0 198.51.100.1 eth0 192.0.2.1] nonmasq=[] nodes=0: device not attached: bad0
			 1.75s apply devices=[bad0 198.51.100.1 eth0 192.0.2.1] nonmasq=[] nodes=0: device not attached: bad0
			 2.00s apply devices=[bad0 198.51.100.1 eth0 192.0.2.7] nonmasq=[] nodes=0: device not attached: bad0
			 2.00s sweep
			 2.01s apply devices=[eth0 192.0.2.7 good0 198.51.100.1] nonmasq=[] nodes=0`)
	})
}

// A walk that takes long is made less often, but each half minute.
func TestLoopRestsAfterLongWalks(t *testing.T) {
	for took, want := range map[time.Duration]int{250 * time.Millisecond: 12, time.Second: 3, time.Minute: 2} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.kernel.walkTook = took
			got := b.run(t, func() { after(61 * time.Second) })
			if n := strings.Count(got, "sweep"); n != want {
				t.Errorf("%d walks of %v in a minute, want %d", n, took, want)
			}
		})
	}
}

// Attached to none of its devices, the agent is not ready.
func TestLoopWithoutAnyDeviceAttached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.network = device(devices.Snapshot{}, 3, "bad0", "198.51.100.1/24")
		b.run(t, func() {
			if s, _ := b.published.Load().status(time.Now(), nil); s.Agent.Ready || s.Agent.AttachError == "" || s.Agent.LastApply.IsZero() {
				t.Errorf("%+v", s.Agent)
			}
			b.set(func() { b.network.Links[0].Name = "good0" })
			after(time.Second)
			if s, _ := b.published.Load().status(time.Now(), nil); !s.Agent.Ready || s.Agent.AttachError != "" {
				t.Errorf("%+v", s.Agent)
			}
		})
	})
}

// Mappings of an address that left while no agent ran end with the first apply.
func TestLoopSweepsAfterAnEarlierAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.earlier.applied = true
		check(t, b.run(t, func() {}), `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=0
			 0.00s sweep`)
	})
}

// Reserved ports that leave none do not stop anything else.
func TestLoopKeepsItsPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ip-masq-agent=true", "snat-port-range=40000-40009")
		write(t, b.list, goodList)
		b.readReserved = func() ([]config.PortRange, error) { return []config.PortRange{{First: 1, Last: 65535}}, nil }
		got := b.run(t, func() {
			after(time.Second)
			write(t, b.list, strings.ReplaceAll(goodList, "10.0.0.0/8", "10.0.0.0/9"))
			b.signals.ipMasq.put()
			after(100 * time.Millisecond)
			s, _ := b.published.Load().status(time.Now(), fakeInspector{attached: b.kernel.Attached()})
			if got := strings.Join(s.Degraded(), "; "); !strings.Contains(got, "40000-40009 stay in use") || !s.Agent.Ready || s.Ports.Pool != 10 {
				t.Errorf("degraded: %s; %+v", got, s.Ports)
			}
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0
			 1.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/9] nodes=0`)
	})
}

// A prefix that no device matches is no defect while another device is there.
func TestUnmatchedPrefixIsANote(t *testing.T) {
	for _, c := range []struct{ devices, degraded, warnings string }{
		{"eth0,wlan+", "", "devices: no device matches wlan+ now: one that does will be attached when it appears"},
		{"wlan+", "no device to masquerade on", "devices: no device matches wlan+ now: one that does will be attached when it appears"},
		{"eth0,wlan0", "device wlan0 is missing", "device wlan0 is missing: it will be attached when it appears"},
		{"eth0,wlan*", "device wlan* is missing", "device wlan* is missing: it will be attached when it appears (all that begin with wlan are written wlan+)"},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, "devices="+c.devices)
			b.run(t, func() {
				s, _ := b.published.Load().status(time.Now(), fakeInspector{attached: b.kernel.Attached()})
				if got := strings.Join(s.Degraded(), "; "); got != c.degraded {
					t.Errorf("%s: degraded %q, want %q", c.devices, got, c.degraded)
				}
				if got := s.Warnings[len(s.Warnings)-1]; got != c.warnings {
					t.Errorf("%s: warnings %q, want %q", c.devices, got, c.warnings)
				}
			})
		})
	}
}

// told is what systemd was told.
type told struct {
	net.Conn
	mu   sync.Mutex
	text strings.Builder
}

func (c *told) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Fprintf(&c.text, "%s\n", b)
}

func (c *told) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// systemd goes on although the agent can't get ready, or a start that never ends
// is ended by it, again and again.
func TestSystemdDoesNotWaitForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.kernel.set(errors.New("no memory"))
		var told told
		b.systemd = &systemd{conn: &told}
		b.run(t, func() {
			b.reload <- struct{}{}
			after(b.timing.patience - time.Second)
			if text := told.String(); strings.Contains(text, "READY") || strings.Contains(text, "RELOADING") {
				t.Error(text)
			}
			after(2 * time.Second)
			if s, _ := b.published.Load().status(time.Now(), nil); s.Agent.Ready {
				t.Errorf("%+v", s.Agent)
			}
			b.reload <- struct{}{}
			b.kernel.set(nil)
			after(time.Minute)
		})
		check(t, strings.TrimSpace(regexp.MustCompile("(?m)^(STATUS|MONOTONIC).*\n").ReplaceAllString(told.String(), "")), "READY=1\nRELOADING=1\nREADY=1")
	})
}

// An agent that follows another one takes up the devices that it had: they stay
// even if they would not be detected now.
func TestLoopTakesUpDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.network.Routes = nil
		b.network.Links[0].Flags = 0
		b.earlier.attached = []datapath.Attachment{{Device: "eth0", Index: 2}}
		got := b.run(t, func() { after(31 * time.Second) })
		for _, line := range strings.Split(got, "\n") {
			if strings.Contains(line, "apply") && !strings.Contains(line, "eth0") {
				t.Error(line)
			}
		}
	})
}

func TestBothFamiliesOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ipv4-masquerade=false", "enable-ipv6-masquerade=false")
		b.run(t, func() {
			s, _ := b.published.Load().status(time.Now(), nil)
			if s.Line() != "Disabled" || len(s.Degraded()) > 0 {
				t.Errorf("%s, degraded: %v", s.Line(), s.Degraded())
			}
		})
	})
}
