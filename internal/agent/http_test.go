package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// probe asks a handler and returns status code and text.
func probe(h http.Handler, method, path string) string {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return fmt.Sprintf("%d %s", w.Code, strings.TrimSpace(w.Body.String()))
}

// handler is that of a loop.
func handler(t *testing.T, l *loop) http.Handler {
	t.Helper()
	s, err := l.newHTTP()
	if err != nil {
		t.Fatal(err)
	}
	return s.handler()
}

// Each way from not ready to ready and back. The process is alive all the time.
func TestReadyz(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ip-masq-agent=true", "prometheus-serve-addr=:9965")
		whole := b.network
		h := handler(t, b.loop)
		state := func(when, want string) {
			t.Helper()
			if got := probe(h, "GET", "/readyz"); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s, want %s", when, got, want)
			}
			if got := probe(h, "GET", "/healthz"); got != "200 ok" {
				t.Errorf("%s: alive: %s", when, got)
			}
		}
		network := func(s devices.Snapshot) {
			b.set(func() { b.network = s })
			b.signals.network.put()
			after(time.Second)
		}
		list := func(text string) {
			if err := os.WriteFile(b.list, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			b.signals.ipMasq.put()
			after(time.Second)
		}
		b.set(func() { b.network = devices.Snapshot{} })
		b.kernel.set(fmt.Errorf("no memory"))
		b.announce()
		state("before anything", "503 no policy applied yet")
		b.run(t, func() {
			after(time.Second)
			state("kernel refuses", "503 policy not applied: no memory")
			b.kernel.set(nil)
			after(time.Minute)
			state("no device", "503 no device to masquerade on")
			network(device(devices.Snapshot{}, 2, "bad0", "192.0.2.1/24"))
			state("not attached", "503 ")
			network(whole)
			state("ready", "200 ok")
			list("nonMasqueradeCIDRs: [10.0.0.0/33]\n")
			state("bad file", "503 config rejected: "+b.list)
			list("nonMasqueradeCIDRs: [10.0.0.0/8]\n")
			state("good file", "200 ok")
			network(device(devices.Snapshot{}, 2, "eth0"))
			state("address gone", "503 device eth0 has no IPv4 address to masquerade with")
			network(whole)
			state("address back", "200 ok")
			b.kernel.set(fmt.Errorf("no memory"))
			list("nonMasqueradeCIDRs: [10.0.0.0/9]\n")
			state("an older policy is in force", "200 ok")
		})
	})
}

// A loop that hangs is not alive, one that is slow is.
func TestHealthz(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "prometheus-serve-addr=:9965")
		h := handler(t, b.loop)
		b.run(t, func() { after(10 * time.Minute) })
		if got := probe(h, "GET", "/healthz"); got != "200 ok" { // it has just ended
			t.Errorf("after ten minutes: %s", got)
		}
		time.Sleep(stallAfter)
		if got := probe(h, "GET", "/healthz"); got != "200 ok" {
			t.Errorf("silent for a minute: %s", got)
		}
		time.Sleep(10 * time.Second)
		if got := probe(h, "GET", "/healthz"); got != "503 the agent's loop has not turned for 70 s" {
			t.Errorf("silent for longer: %s", got)
		}
	})
}

func TestHTTPMethods(t *testing.T) {
	b := newBench(t, "prometheus-serve-addr=:9965")
	b.inspect = noKernel
	b.announce()
	h := handler(t, b.loop)
	for request, code := range map[string]string{
		"GET /metrics": "200", "HEAD /metrics": "200", "HEAD /healthz": "200", "HEAD /readyz": "503",
		"POST /metrics": "405", "PUT /healthz": "405", "DELETE /readyz": "405",
		"GET /": "404", "GET /debug/pprof/": "404", "GET /metrics/": "404", "GET /status": "404",
	} {
		method, path, _ := strings.Cut(request, " ")
		if got := probe(h, method, path); !strings.HasPrefix(got, code) {
			t.Errorf("%s: %.100s, want %s", request, got, code)
		}
	}
}

// What a scrape shows in either mode, and when the kernel can't be read.
func TestReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "prometheus-serve-addr=:9965", "metrics-per-pod=5", "leak-sentinel=true")
		k := fakeInspector{
			attached: []datapath.Attachment{{Device: "eth0", Index: 2, Hook: datapath.HookTCX, Sentinel: true}},
			counts:   []datapath.Count{{Outcome: policy.DropQuota, Packets: 7}, {Outcome: policy.MasqNew, IPv6: true, Packets: 2, Bytes: 99}},
			leaks:    []datapath.Leak{{Index: 2, Packets: 3}},
		}
		k.usage[1].Limit = 4096
		b.inspect = func() (inspector, error) { return k, nil }
		h := handler(t, b.loop)
		shows := func(want ...string) {
			t.Helper()
			page := probe(h, "GET", "/metrics")
			for _, w := range want {
				w, absent := strings.CutPrefix(w, "!")
				if strings.Contains(page, "\nbauta_"+w) == absent {
					t.Errorf("%s: %t\n%s", w, absent, page)
				}
			}
		}
		b.announce()
		shows("ready 0", "!nat_flows{", `device_attached{device="eth0",direction="ingress",hook="tcx"} 1`)
		b.run(t, func() {
			after(7 * time.Second)
			shows("ready 1", "config_valid 1", `nat_flows{family="ipv4",proto="tcp"} 4`, "port_use_ratio_max 0.25", `drops_total{reason="drop-quota"} 7`,
				`bytes_total{direction="egress",family="ipv6",reason="masq-new"} 99`, `nat_flows_limit{family="ipv6"} 4096`, `leaked_packets_total{device="eth0"} 3`,
				`nat_gc_removed_total{reason="reclaimed"} 5`, `pod_flows{address="10.1.0.9"} 3`, `masquerade_address_info{address="192.0.2.1",device="eth0",family="ipv4"} 1`,
				"nat_gc_duration_seconds_count 1")
			k.err = fmt.Errorf("tables not readable")
			if got := probe(h, "GET", "/metrics"); !strings.HasPrefix(got, "500 ") || !strings.Contains(got, "tables not readable") {
				t.Errorf("unreadable: %s", got)
			}
			b.inspect = func() (inspector, error) { return noKernel() }
			shows("ready 1", "!drops_total", `!device_attached{device="eth0",direction="egress",hook="tcx"}`)
		})
	})
}

// web is a server in a network namespace.
type web struct {
	*httpServer
	ns   *lab.NS
	logs strings.Builder
}

func newWeb(t *testing.T, addr string) *web {
	w := &web{ns: labtest.NewNS(t)}
	w.httpServer = &httpServer{
		addr: addr, stall: time.Minute, silent: func() time.Duration { return 0 }, retry: 10 * time.Millisecond,
		unready: func() []string { return []string{"a\nb"} },
		metrics: func(http.Header) ([]byte, string, error) { return []byte("m 1\n"), "text/plain", nil },
		log:     slog.New(slog.NewTextHandler(&w.logs, nil)), busy: make(chan struct{}, scrapes),
	}
	return w
}

// start runs it until stop, or the end of the test.
func (w *web) start(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- w.ns.Do(func() error { w.run(ctx); return nil })
	}()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		done <- nil
	}
	t.Cleanup(stop)
	return stop
}

func (w *web) dial(addr string) (conn net.Conn, err error) {
	err = w.ns.Do(func() error {
		conn, err = net.Dial("tcp", addr)
		return err
	})
	return conn, err
}

func (w *web) get(addr, path string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return w.dial(addr) },
	}}
	answer, err := client.Get("http://" + addr + path)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return fmt.Sprintf("%d %s", answer.StatusCode, body), err
}

// port is where it listens.
func (w *web) port(t *testing.T) string {
	t.Helper()
	labtest.Eventually(t, 5*time.Second, func() error {
		if w.bound.Load() == nil {
			return fmt.Errorf("does not listen: %q", w.problem())
		}
		return nil
	})
	return fmt.Sprint(w.bound.Load().Port())
}

func TestListenForms(t *testing.T) {
	for form, reached := range map[string][2]bool{ // by IPv4, IPv6
		":0": {true, true}, "[::]:0": {true, true}, "0.0.0.0:0": {true, false}, "127.0.0.1:0": {true, false}, "[::1]:0": {false, true},
	} {
		t.Run(form, func(t *testing.T) {
			w := newWeb(t, form)
			w.start(t)
			port := w.port(t)
			for i, host := range []string{"127.0.0.1", "::1"} {
				got, err := w.get(net.JoinHostPort(host, port), "/readyz")
				if (err == nil) != reached[i] || err == nil && got != "503 a b\n" {
					t.Errorf("by %s: %q %v", host, got, err)
				}
			}
		})
	}
}

// An address that is taken holds up nothing: it is said, with what to do, and tried until it is free.
func TestAddressInUse(t *testing.T) {
	w := newWeb(t, "127.0.0.1:9965")
	var taken net.Listener
	if err := w.ns.Do(func() (err error) { taken, err = net.Listen("tcp", w.addr); return err }); err != nil {
		t.Fatal(err)
	}
	stop := w.start(t)
	labtest.Eventually(t, 5*time.Second, func() error {
		if got := w.problem(); got != "prometheus-serve-addr 127.0.0.1:9965: bind: address already in use" {
			return fmt.Errorf("problem %q", got)
		}
		return nil
	})
	taken.Close()
	w.port(t)
	if got, err := w.get(w.addr, "/healthz"); err != nil || got != "200 ok\n" {
		t.Errorf("%q %v", got, err)
	}
	if got := w.problem(); got != "" {
		t.Errorf("still a problem: %s", got)
	}
	stop()
	if got := w.logs.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, "give another port, or `off`") || !strings.Contains(got, "answer again") {
		t.Errorf("log:\n%s", got)
	}
}

func TestListenErrors(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.99:9965": "give an address of this node, or `:PORT` for all of them",
		"127.0.0.1:9965":  "another program listens there: give another port, or `off`",
	} {
		w := newWeb(t, addr)
		err := w.ns.Do(func() error {
			if l, err := net.Listen("tcp", "127.0.0.1:9965"); err == nil {
				defer l.Close()
			}
			_, err := listenTCP(t.Context(), addr)
			return err
		})
		if got := strings.Join(advice.Of(err), "; "); err == nil || got != want || strings.Count(err.Error(), addr) != 1 {
			t.Errorf("%v, hint %q", err, got)
		}
	}
}

// Who is slow, says nothing or opens many connections keeps neither a probe nor a scraper waiting.
func TestSlowClients(t *testing.T) {
	w := newWeb(t, "127.0.0.1:9965")
	var rendered atomic.Int32
	body := []byte(strings.Repeat("m 1\n", 4<<20))
	w.metrics = func(http.Header) ([]byte, string, error) {
		rendered.Add(1)
		return body, "text/plain", nil
	}
	w.start(t)
	w.port(t)
	const slow = scrapes + 3
	for range slow {
		conn, err := w.dial(w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n") // and never reads
	}
	labtest.Eventually(t, 5*time.Second, func() error {
		if n := rendered.Load(); n < slow {
			return fmt.Errorf("%d of %d answered", n, slow)
		}
		return nil
	})
	for range 2 * httpConns {
		conn, err := w.dial(w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close() // and never asks
	}
	start := time.Now()
	for path, want := range map[string]string{"/healthz": "200 ok\n", "/metrics": "200 " + string(body)} {
		if got, err := w.get(w.addr, path); err != nil || got != want {
			t.Errorf("%s: %.40q %v", path, got, err)
		}
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("took %v", took)
	}
}

// A crowd holds as many as it may, and those that left make room.
func TestCrowd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := newCrowd(l, 2)
	defer c.Close()
	pair := func() (client, server net.Conn) {
		t.Helper()
		client, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		server, err = c.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return client, server
	}
	open := func(client net.Conn) bool {
		client.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := client.Read(make([]byte, 1))
		return os.IsTimeout(err)
	}
	first, _ := pair()
	second, served := pair()
	if served.Close(); open(second) {
		t.Error("closed, and still open")
	}
	third, _ := pair()
	if !open(first) || !open(third) {
		t.Error("one of two was closed")
	}
	fourth, _ := pair()
	if open(first) || !open(third) || !open(fourth) {
		t.Error("it is not the oldest that went")
	}
}
