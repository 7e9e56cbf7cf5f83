package cluster_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
)

// scrapeConfig has all nodes: Debian's Prometheus can't ask Kubernetes.
func scrapeConfig() string {
	var b strings.Builder
	b.WriteString("global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: bauta\n  static_configs:\n")
	for _, n := range shared.Nodes() {
		fmt.Fprintf(&b, "  - {targets: ['%s:9977'], labels: {node: %s}}\n", n.Addr.V4, n.Name)
	}
	return b.String()
}

// A real Prometheus scrapes all agents and can tell what they did.
func TestPrometheus(t *testing.T) {
	noLeak(t)
	labtest.Tool(t, "prometheus")
	install(t, "prometheus.enabled=true")
	TestWorldSeesTheNode(t) // there is something to tell
	dir := t.TempDir()
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(scrapeConfig()), 0o644); err != nil {
		t.Fatal(err)
	}
	stop, err := shared.Beside("prometheus", "prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:9090", "--log.level=warn")
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, stop)

	for query, want := range map[string]float64{
		`sum(up{job="bauta"})`: float64(len(shared.Nodes())),
		`sum(bauta_packets_total{direction="egress",reason="masq-new"}) > bool 0`: 1,
		`count(bauta_device_attached{device="eth0"} == 1) by (node) >= bool 1`:    1,
		`min(bauta_nodes)`: float64(len(shared.Nodes()) - 1),
	} {
		wait(t, time.Minute, func() error {
			got, err := ask9090(t.Context(), query)
			if err != nil {
				return err
			}
			if len(got) == 0 || got[0] != want {
				return fmt.Errorf("%s is %v, want %v", query, got, want)
			}
			return nil
		})
	}
	// What a node says is clean by Prometheus' own standard.
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: node(0).Dial, DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:9977/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	check := exec.Command(labtest.Tool(t, "promtool"), "check", "metrics")
	check.Stdin = resp.Body
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// ask9090 asks the Prometheus that runs beside the API server.
func ask9090(ctx context.Context, query string) (values []float64, err error) {
	var answer struct {
		Data struct {
			Result []struct{ Value [2]json.RawMessage }
		}
	}
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: shared.DialBeside, DisableKeepAlives: true}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9090/api/v1/query", nil)
	if err != nil {
		return nil, err
	}
	q := r.URL.Query()
	q.Set("query", query)
	r.URL.RawQuery = q.Encode()
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	for _, r := range answer.Data.Result {
		var text string
		var value float64
		if err := json.Unmarshal(r.Value[1], &text); err != nil {
			return nil, err
		}
		if _, err := fmt.Sscan(text, &value); err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	return values, nil
}
