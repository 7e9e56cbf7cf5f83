package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

const prometheusAddr = "127.0.0.1:9090"

// startPrometheus runs the real one in the node, with the rules of the chart, and has it scrape the agent.
func (n *node) startPrometheus() {
	n.t.Helper()
	rules, err := filepath.Abs("../../charts/bauta/files/alerts.yaml")
	must(n.t, err)
	config := n.write("prometheus.yaml", fmt.Sprintf(`
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
- job_name: bauta
  static_configs: [{targets: [%q]}]
`, rules, httpAddr))
	cmd := exec.Command(labtest.Tool(n.t, "prometheus"), "--config.file="+config, "--storage.tsdb.path="+filepath.Join(n.dir, "tsdb"),
		"--web.listen-address="+prometheusAddr, "--log.level=warn")
	var log logBuffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(n.t, startIn(n.Node, cmd))
	n.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if n.t.Failed() {
			n.t.Logf("Prometheus:\n%s", log.String())
		}
	})
}

// query is how many series a query gives, and the value of the first.
func (n *node) query(expr string) (series int, value string, err error) {
	code, body, err := n.get(prometheusAddr, "/api/v1/query?query="+url.QueryEscape(expr))
	if err != nil {
		return 0, "", err
	}
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || code != 200 {
		return 0, "", fmt.Errorf("%s: %d %s %w", expr, code, body, err)
	}
	if list := answer.Data.Result; len(list) > 0 {
		return len(list), fmt.Sprint(list[0].Value[1]), nil
	}
	return 0, "", nil
}

// A real Prometheus scrapes the agent, and its alerts see what is wrong.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, httpOption, "--devices=eth0,eth9") // one of them is missing
	n.startPrometheus()
	await := func(expr, want string) {
		t.Helper()
		labtest.Eventually(t, patience, func() error {
			series, value, err := n.query(expr)
			if err == nil && (series == 0) != (want == "") || value != want {
				err = fmt.Errorf("%s: %d series, the first is %s, want %s", expr, series, value, want)
			}
			return err
		})
	}
	await(`up{job="bauta"}`, "1")
	await(`bauta_ready`, "1")
	await(`bauta_device_attached{device="eth9", direction="egress"}`, "0")
	await(`ALERTS{alertname="BautaDeviceNotAttached", device="eth9", direction="egress"}`, "1")
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
	if n.backend == "" {
		await(`sum(bauta_packets_total{direction="egress", family="ipv4", reason="masq-new"})`, "1")
		await(`sum(bauta_nat_flows{family="ipv4"})`, "1")
	}
	must(t, n.Node.DeleteLink("eth0"))
	await(`ALERTS{alertname="BautaNotReady"}`, "1")
}
