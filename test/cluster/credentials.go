package cluster

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// admin may do everything; the harness is that.
const admin = "admin"

// users are the identities of the control plane, with their groups.
var users = map[string]string{
	admin:                            "system:masters",
	"system:kube-controller-manager": "",
	"system:kube-scheduler":          "",
	"system:kube-proxy":              "",
}

// credentials are static tokens: every component has an identity of its own, and no
// certificates are needed but the API server's, which makes that itself.
type credentials struct {
	dir    string
	tokens map[string]string
}

// newCredentials writes what the API server reads at its start; nodes that may join
// later are among it.
func newCredentials(dir string) (*credentials, error) {
	c := &credentials{dir, map[string]string{}}
	groups := map[string]string{}
	for user, group := range users {
		groups[user] = group
	}
	for i := range maxNodes {
		groups["system:node:"+nodeName(i+1)] = "system:nodes"
	}
	var lines strings.Builder
	for user, group := range groups {
		secret := make([]byte, 16)
		rand.Read(secret)
		c.tokens[user] = hex.EncodeToString(secret)
		fmt.Fprintf(&lines, "%s,%s,%s,%q\n", c.tokens[user], user, user, group)
	}
	if err := os.WriteFile(c.tokensFile(), []byte(lines.String()), 0o600); err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	der := x509.MarshalPKCS1PrivateKey(key)
	text := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: der})
	return c, os.WriteFile(c.accountKey(), text, 0o600)
}

func (c *credentials) tokensFile() string { return filepath.Join(c.dir, "tokens.csv") }

// accountKey signs the tokens of ServiceAccounts.
func (c *credentials) accountKey() string { return filepath.Join(c.dir, "accounts.key") }

// authority is the API server's certificate, which is its own issuer.
func (c *credentials) authority() string { return filepath.Join(c.dir, "pki", "apiserver.crt") }

// kubeconfig writes the kubeconfig of a user and returns its path.
func (c *credentials) kubeconfig(user string) (string, error) {
	token, ok := c.tokens[user]
	if !ok {
		return "", fmt.Errorf("user %s: unknown", user)
	}
	path := filepath.Join(c.dir, strings.ReplaceAll(user, ":", "-")+".kubeconfig")
	return path, os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://%s:%d", certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, plane.V4, apiPort, c.authority(), token), 0o600)
}
