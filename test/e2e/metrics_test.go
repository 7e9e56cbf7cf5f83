package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

const (
	httpAddr   = "127.0.0.1:9965"
	httpOption = "--prometheus-serve-addr=" + httpAddr
)

// page gets a page of the agent.
func (n *node) page(path string) (code int, body string, err error) { return n.get(httpAddr, path) }

// get gets a page of whoever listens in the node.
func (n *node) get(addr, path string) (code int, body string, err error) {
	dial := func(context.Context, string, string) (conn net.Conn, err error) {
		err = n.Node.Do(func() error {
			conn, err = net.Dial("tcp", addr)
			return err
		})
		return conn, err
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	answer, err := client.Get("http://" + addr + path)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer.StatusCode, string(text), err
}

// samples are series with their values.
type samples map[string]float64

var sample = regexp.MustCompile(`^([a-z_]+(?:\{.*\})?) (\S+)$`)

func (n *node) tryScrape() (samples, error) {
	code, body, err := n.page("/metrics")
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("%w: %d %s", errAnswer, code, body)
	}
	s := make(samples)
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		m := sample.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			return nil, fmt.Errorf("%w: %q", errAnswer, line)
		}
		value, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, fmt.Errorf("%w: %q: %w", errAnswer, line, err)
		}
		s[strings.TrimPrefix(m[1], "bauta_")] = value
	}
	return s, nil
}

// errAnswer: somebody answered, but not with metrics.
var errAnswer = errors.New("no exposition")

func (n *node) scrape() samples {
	n.t.Helper()
	s, err := n.tryScrape()
	must(n.t, err)
	return s
}

// awaitSamples waits until series have these values.
func (n *node) awaitSamples(want samples) {
	n.t.Helper()
	labtest.Eventually(n.t, patience, func() error {
		s, err := n.tryScrape()
		for series, value := range want {
			if err == nil && s[series] != value {
				err = fmt.Errorf("%s: %v, want %v", series, s[series], value)
			}
		}
		return err
	})
}

// talker is a socket of the pod, and counts what it sends.
type talker struct {
	*net.UDPConn
	t  testing.TB
	to netip.AddrPort
}

func newTalker(n *node, to netip.AddrPort) *talker {
	n.t.Helper()
	c, err := lab.ListenUDP(n.Pods[0], anyPort(n.PodAddrs[0].Of(to.Addr())))
	must(n.t, err)
	labtest.Close(n.t, c.Close)
	return &talker{c, n.t, to}
}

// send sends datagrams of 100 bytes. An error of an earlier one is no error of this one: the
// socket is not connected.
func (c *talker) send(times int) {
	c.t.Helper()
	for range times {
		_, err := c.WriteToUDPAddrPort(make([]byte, 100), c.to)
		must(c.t, err)
	}
}

// answer waits for so many datagrams and sends each back.
func answer(t testing.TB, c *net.UDPConn, times int) {
	t.Helper()
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 200)
	for range times {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		must(t, err)
		_, err = c.WriteToUDPAddrPort(buf[:n], from)
		must(t, err)
	}
}

// hear waits for answers.
func (c *talker) hear(times int) {
	c.t.Helper()
	must(c.t, c.SetReadDeadline(time.Now().Add(patience)))
	for range times {
		_, _, err := c.ReadFromUDPAddrPort(make([]byte, 200))
		must(c.t, err)
	}
}

// What is counted is what was sent; counters of the kernel go on over a restart of the agent.
func TestMetrics(t *testing.T) {
	t.Parallel()
	const ports, datagrams, refused = 4, 3, 7
	n := startNode(t, lab.Options{}, httpOption, "--snat-port-range=40000-40003", "--metrics-per-pod=10", "--bpf-nat-global-max=4096")
	before := n.scrape()
	want := samples{
		`drops_total{reason="drop-no-port"}`: 2 * refused, `drops_total{reason="drop-no-address"}`: 0,
		`nat_flows_limit{family="ipv4"}`: 4096, `nat_flows_limit{family="ipv6"}`: 4096, `nat_inbound_flows_limit{family="ipv6"}`: 1024,
		`nat_flows{family="ipv4",proto="udp"}`: ports, `nat_flows{family="ipv6",proto="udp"}`: ports,
		"port_use_ratio_max": 1, "port_allocation_attempts_count": 2 * ports, "ready": 1, "config_valid": 1,
	}
	for _, direction := range []string{"egress", "ingress"} {
		want[fmt.Sprintf(`device_attached{device="eth0",direction=%q,hook=%q}`, direction, n.status().Devices[0].Hook)] = 1
	}
	for i, dst := range n.WorldAddr.All() {
		fam := []string{"ipv4", "ipv6"}[i]
		sink, err := lab.ListenUDP(n.World, anyPort(dst))
		must(t, err)
		labtest.Close(t, sink.Close)
		to := sink.LocalAddr().(*net.UDPAddr).AddrPort()
		for range ports {
			c := newTalker(n, to)
			c.send(datagrams)
			answer(t, sink, datagrams)
			c.hear(datagrams)
		}
		newTalker(n, to).send(refused) // there is no port left
		series := func(metric, direction, reason string) string {
			return fmt.Sprintf(`%s{direction="%s",family="%s",reason="%s"}`, metric, direction, fam, reason)
		}
		headers := []float64{20, 40}[i] + 8
		want[series("packets_total", "egress", "masq-new")] = ports
		want[series("packets_total", "egress", "masq-known")] = ports * (datagrams - 1)
		want[series("packets_total", "ingress", "masq-known")] = ports * datagrams
		want[series("packets_total", "egress", "drop-no-port")] = refused
		want[series("bytes_total", "ingress", "masq-known")] = ports * datagrams * (100 + headers)
		want[fmt.Sprintf(`masquerade_address_info{address="%s",device="eth0",family="%s"}`, n.NodeAddr.Of(dst), fam)] = 1
		want[fmt.Sprintf(`pod_flows{address="%s"}`, n.PodAddrs[0].Of(dst))] = ports
		want[fmt.Sprintf(`pod_refused_total{address="%s"}`, n.PodAddrs[0].Of(dst))] = refused
	}
	n.awaitSamples(want)
	after := n.scrape()
	if a := after[`port_allocation_failures_total{reason="exhausted"}`] + after[`port_allocation_failures_total{reason="remembered"}`]; a != 2*refused {
		t.Errorf("%v failures, want %d", a, 2*refused)
	}
	if before["port_allocation_attempts_count"] != 0 || after[`nat_gc_removed_total{reason="expired"}`] != 0 {
		t.Errorf("before any flow: %v searches; with all alive: %v expired", before["port_allocation_attempts_count"], after[`nat_gc_removed_total{reason="expired"}`])
	}

	n.kill()
	n.start(n.agent.args...)
	n.awaitSamples(want) // the gauges of the walk too, after the first one
	again := n.scrape()
	for _, series := range []string{`port_allocation_failures_total{reason="exhausted"}`, `port_allocation_failures_total{reason="remembered"}`, `port_allocation_attempts_bucket{le="1"}`} {
		if again[series] != after[series] {
			t.Errorf("%s: %v after a restart, %v before", series, again[series], after[series])
		}
	}
	n.stop()
	if _, _, err := n.page("/healthz"); err == nil {
		t.Error("it still answers after the end")
	}
}

// Without metrics-per-pod no address of a pod is on any page.
func TestMetricsShowNoPods(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, httpOption)
	w := n.tapWorld()
	w.want(n.WorldAddr.V4, n.NodeAddr.V4)
	w.want(n.WorldAddr.V6, n.NodeAddr.V6)
	for _, path := range []string{"/metrics", "/readyz", "/healthz"} {
		code, body, err := n.page(path)
		if err != nil || code != http.StatusOK {
			t.Errorf("%s: %d %v", path, code, err)
		}
		for _, pod := range n.PodAddrs {
			if strings.Contains(body, pod.V4.String()) || strings.Contains(body, pod.V6.String()) {
				t.Errorf("%s shows a pod:\n%s", path, body)
			}
		}
	}
}

// What iptables mode has, and what it has not.
func TestIPTablesModeMetrics(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, _ string) {
		n.start(iptablesMode, podCIDRs, httpOption)
		w := n.tapWorld()
		w.want(n.WorldAddr.V4, n.NodeAddr.V4)
		n.awaitSamples(samples{"ready": 1, `mode_info{mode="iptables"}`: 1, `device_attached{device="eth0",direction="egress",hook="iptables"}`: 1})
		s := n.scrape()
		if s["conntrack_entries"] == 0 || s["conntrack_entries_limit"] == 0 {
			t.Errorf("connections: %v of %v", s["conntrack_entries"], s["conntrack_entries_limit"])
		}
		for series := range s {
			for _, absent := range []string{"packets_total", "nat_", "port_", "pod_", "events_"} {
				if strings.HasPrefix(series, absent) {
					t.Errorf("%s in iptables mode", series)
				}
			}
		}
		must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V4, 24)))
		n.awaitDegraded("no IPv4 address")
		must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Dev: "eth0"}))
		w.send(netip.Addr{}, n.WorldAddr.V4)
		n.awaitSamples(samples{`drops_total{reason="drop-no-address"}`: 1, "ready": 0})
	})
}

// Each way from not ready to ready and back, in the mode of the run; the process is alive all
// the time.
func TestReadyz(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	list := n.writeList("10.0.0.0/8")
	await := func(when string, ready int, text string) {
		t.Helper()
		labtest.Eventually(t, patience, func() error {
			code, body, err := n.page("/readyz")
			if err == nil && (code != ready || !strings.Contains(body, text)) {
				err = fmt.Errorf("%s: %d %q, want %d %q", when, code, body, ready, text)
			}
			return err
		})
		if code, body, err := n.page("/healthz"); err != nil || code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: alive: %d %q %v", when, code, body, err)
		}
	}
	files := []string{"--enable-ip-masq-agent", "--ip-masq-agent-config-path=" + list, podCIDRs, httpOption}
	n.launch(append(files, "--devices=eth9")...)
	await("a device that is missing", 503, "device eth9 is missing")
	n.stop()
	n.launch(append(files, "--devices=eth0")...)
	await("started", 200, "ok\n")
	n.write("ip-masq-agent", "nonMasqueradeCIDRs: [10.0.0.0/99]\n")
	await("bad file", 503, "config rejected: ")
	n.awaitSamples(samples{"ready": 0, "config_valid": 0, `config_reloads_total{result="failure"}`: 1})
	n.writeList("10.0.0.0/9")
	await("good file", 200, "ok\n")
	n.awaitSamples(samples{"ready": 1, "config_valid": 1, "nonmasq_prefixes": 3, `config_reloads_total{result="success"}`: 2})
	must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V4, 24)))
	await("address gone", 503, "device eth0 has no IPv4 address to masquerade with\n")
	must(t, n.Node.AddAddr("eth0", netip.PrefixFrom(n.NodeAddr.V4, 24)))
	await("address back", 200, "ok\n")
	if st := n.awaitOK(); st.Agent.HTTPError != "" {
		t.Error(st.Agent.HTTPError)
	}
}

// An address that somebody has is no reason not to masquerade, and is used when it is free.
func TestHTTPAddressInUse(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	taken, err := lab.ListenTCP(n.Node, netip.MustParseAddrPort(httpAddr))
	must(t, err)
	defer taken.Close()
	n.start(podCIDRs, httpOption)
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
	n.awaitDegraded("prometheus-serve-addr " + httpAddr + ": bind: address already in use")
	if log := n.log.String(); !strings.Contains(log, "give another port") {
		t.Errorf("no hint:\n%s", log)
	}
	must(t, taken.Close())
	n.awaitOK()
	n.awaitSamples(samples{"ready": 1})
}

// Scrapes while the agent ends, starts and migrates its tables are whole, or there is no answer.
func TestScrapesDuringRestart(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, httpOption, "--bpf-nat-global-max=4096")
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
	var whole atomic.Int32
	var all sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		all.Go(func() {
			last := make(samples)
			for {
				select {
				case <-done:
					return
				default:
				}
				s, err := n.tryScrape()
				if errors.Is(err, errAnswer) {
					t.Error(err)
				}
				if err != nil {
					continue // nobody is there
				}
				whole.Add(1)
				for _, series := range []string{`packets_total{direction="egress",family="ipv4",reason="masq-new"}`, "port_allocation_attempts_count"} {
					if s[series] < last[series] {
						t.Errorf("%s went from %v to %v", series, last[series], s[series])
					}
				}
				maps.Copy(last, s)
			}
		})
	}
	args := n.agent.args
	for i, size := range []string{"4096", "8192", "16384"} { // each other size is a migration
		before := whole.Load()
		n.kill()
		n.start(append(args, "--bpf-nat-global-max="+size)...)
		labtest.Eventually(t, patience, func() error {
			if whole.Load() < before+20 {
				return fmt.Errorf("%d scrapes of agent %d", whole.Load()-before, i)
			}
			return nil
		})
	}
	close(done)
	all.Wait()
}
