package metrics_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/metrics"
	"bauta.dev/bauta/internal/policy"
)

var update = flag.Bool("update", false, "write the golden files and docs/metrics.md")

var began = time.Unix(1_700_000_000, 0)

// bpfReading has something of everything that eBPF mode can show.
func bpfReading() metrics.Reading {
	walks := metrics.Walks{}.After(datapath.Swept{Expired: 3, Took: 700 * time.Microsecond}, began)
	walks = walks.After(datapath.Swept{
		Expired: 40, Vanished: 2, Orphans: 1, Took: 2 * time.Second,
		Usage:  [2]datapath.Usage{{Flows: 17, Inbound: 5}, {Flows: 4}},
		Protos: [2]map[uint8]int{{6: 10, 17: 3, 1: 2, 47: 1, 50: 1}, {58: 4}},
		Worst:  datapath.PortUse{Used: 8192, Pool: 32768},
	}, began.Add(10*time.Second))
	lost := uint64(12)
	return metrics.Reading{
		Version: "v1", Mode: "BPF", Ready: true, ConfigValid: true,
		Reloads: metrics.Reloads{Accepted: 2, Rejected: 1, LastAccepted: began}, Prefixes: 3, Nodes: 9,
		Devices: []metrics.Device{
			{Name: "eth0", Hook: "tcx", Directions: []string{"egress", "ingress"}, Attached: true,
				IPv4: netip.MustParseAddr("192.0.2.1"), IPv6: netip.MustParseAddr("2001:db8::1")},
			{Name: "wg\xff", Hook: "none", Directions: []string{"egress", "ingress"}},
			{Name: "wg\xff", Hook: "none", Directions: []string{"egress", "ingress"}}, // another one of that name
		},
		Programs: &metrics.Programs{
			Counts: []datapath.Count{
				{Outcome: policy.MasqNew, Packets: 7, Bytes: 700},
				{Outcome: policy.MasqKnown, Ingress: true, IPv6: true, Packets: 9, Bytes: 901},
				{Outcome: policy.DropNoPort, Packets: 5, Bytes: 300},
				{Outcome: policy.DropNoPort, IPv6: true, Packets: 6, Bytes: 400},
			},
			Limits:    [2]datapath.Usage{{Limit: 65536, InboundLimit: 16384}, {Limit: 65536, InboundLimit: 16384}},
			Searches:  datapath.PortSearches{Attempts: []uint64{100, 10, 5, 0, 0, 0, 0, 0, 0, 0, 1, 2}, Failures: 11, Remembered: 30},
			Reclaimed: 6, Leaked: map[string]uint64{"eth0": 4},
			Pods: []datapath.Pod{{Addr: netip.MustParseAddr("10.1.0.5"), Flows: 12, Refused: 3}},
		},
		Walks: &walks, EventsLost: &lost,
	}
}

func netfilterReading() metrics.Reading {
	return metrics.Reading{
		Version: "v1", Mode: "iptables", Reloads: metrics.Reloads{LastAccepted: began},
		Devices: []metrics.Device{{Name: "eth0", Hook: "iptables", Directions: []string{"egress"}, Attached: true,
			IPv4: netip.MustParseAddr("192.0.2.1")}},
		Netfilter: &metrics.Netfilter{Drops: map[string]uint64{"drop-no-address": 3}, Entries: 1000, Maximum: 262144},
	}
}

func exposition(t *testing.T, read func() (metrics.Reading, error)) *metrics.Exposition {
	t.Helper()
	x, err := metrics.NewExposition(metrics.New(read))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// page is the exposition of a reading, without what the process takes: that differs.
func page(t *testing.T, r metrics.Reading) string {
	t.Helper()
	body, kind, err := exposition(t, func() (metrics.Reading, error) { return r, nil }).Render(nil)
	if err != nil || !strings.HasPrefix(kind, "text/plain; version=0.0.4") {
		t.Fatalf("%q %v", kind, err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(body)) {
		if !regexp.MustCompile(`^(# (HELP|TYPE) )?(process)_`).MatchString(line) {
			b.WriteString(strings.ReplaceAll(line, runtime.Version(), "GOVERSION"))
		}
	}
	return b.String()
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test ./internal/metrics -update writes it)", err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs (go test ./internal/metrics -update writes it), -want +got:\n%s", path, diff)
	}
}

// promtool runs Prometheus' own checker. CI has it, a developer may not.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	switch {
	case err != nil && os.Getenv("CI") != "":
		t.Fatalf("%v (tools/need test installs it)", err)
	case err != nil:
		t.Skipf("missing program: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	if args[1] == "metrics" && len(bytes.TrimSpace(out)) > 0 { // it is content where it says nothing
		t.Errorf("promtool %s:\n%s", strings.Join(args, " "), out)
	}
}

func TestExposition(t *testing.T) {
	off := metrics.Reading{Version: "v1", Mode: "BPF", Reloads: metrics.Reloads{LastAccepted: began}}
	for name, r := range map[string]metrics.Reading{"bpf": bpfReading(), "iptables": netfilterReading(), "nothing": off} {
		t.Run(name, func(t *testing.T) {
			text := page(t, r)
			golden(t, filepath.Join("testdata", name+".txt"), text)
			body, _, err := exposition(t, func() (metrics.Reading, error) { return r, nil }).Render(nil)
			if err != nil {
				t.Fatal(err)
			}
			promtool(t, string(body), "check", "metrics")
		})
	}
}

// Every metric of the table is in one of the readings above, and so in a golden file.
func TestEveryMetricIsShown(t *testing.T) {
	all := page(t, bpfReading()) + page(t, netfilterReading())
	for _, m := range metrics.Table() {
		if !strings.Contains(all, "\n# TYPE "+m.FullName()+" "+string(m.Kind)+"\n") && !strings.HasPrefix(all, "# TYPE "+m.FullName()+" ") {
			t.Errorf("%s: no reading has it", m.FullName())
		}
		if strings.HasSuffix(m.Help, ".") || m.Example == "" {
			t.Errorf("%s: HELP is a line without a full stop, and there is an example", m.FullName())
		}
	}
}

// What section 6 of the contract names is there, with these labels.
func TestContract(t *testing.T) {
	const contract = `build_info, config_valid, config_reloads_total{result}, config_last_success_timestamp_seconds, nonmasq_prefixes, nodes,
		device_attached{device,direction,hook}, masquerade_address_info{device,family,address}, packets_total{direction,family,reason},
		bytes_total{direction,family,reason}, drops_total{reason}, nat_flows{family,proto}, nat_flows_limit{family}, port_allocation_attempts,
		port_allocation_failures_total{reason}, port_use_ratio_max, nat_gc_duration_seconds, nat_gc_removed_total{reason}, events_lost_total`
	have := make(map[string]string)
	for _, m := range metrics.Table() {
		have[m.Name] = strings.Join(m.Labels, ",")
	}
	for _, m := range regexp.MustCompile(`([a-z_]+)(?:\{([a-z,]+)\})?`).FindAllStringSubmatch(contract, -1) {
		name, labels := m[1], m[2]
		if got, ok := have[name]; !ok || got != labels && name != "build_info" {
			t.Errorf("%s: labels %q, want %q", name, got, labels)
		}
	}
}

// What the process takes is there too, by the names that all programs have.
func TestProcess(t *testing.T) {
	body, _, err := exposition(t, func() (metrics.Reading, error) { return bpfReading(), nil }).Render(nil)
	if err != nil {
		t.Fatal(err)
	}
	var names strings.Builder
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (process_\w+) `).FindAllStringSubmatch(string(body), -1) {
		fmt.Fprintln(&names, m[1])
	}
	golden(t, "testdata/process.txt", names.String())
}

// A reading that fails makes a scrape fail, and the next one is as good as ever.
func TestFailingReading(t *testing.T) {
	var failure error
	x := exposition(t, func() (metrics.Reading, error) { return bpfReading(), failure })
	failure = errors.New("tables not readable")
	if body, _, err := x.Render(nil); err == nil || !strings.Contains(err.Error(), "tables not readable") {
		t.Errorf("%s %v", body, err)
	}
	failure = nil
	if _, _, err := x.Render(nil); err != nil {
		t.Error(err)
	}
}

// Scrapes may overlap, in any form that Prometheus asks for.
func TestScrapesAtOnce(t *testing.T) {
	x := exposition(t, func() (metrics.Reading, error) { return bpfReading(), nil })
	var all sync.WaitGroup
	const text, protobuf = "text/plain; version=0.0.4", "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
	for accept, want := range map[string]string{
		"": text, "*/*": text, "text/html,application/xhtml+xml,*/*;q=0.8": text, "text/plain;version=0.0.4": text, protobuf: protobuf,
		"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1": text,
		protobuf + ";q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.1":                                protobuf,
	} {
		for range 5 {
			all.Go(func() {
				body, kind, err := x.Render(http.Header{"Accept": {accept}})
				if err != nil || !bytes.Contains(body, []byte("bauta_port_use_ratio_max")) || !strings.HasPrefix(kind, want) {
					t.Errorf("%q: %q %v, want %s", accept, kind, err, want)
				}
			})
		}
	}
	all.Wait()
}
